import { modals } from "@mantine/modals";
import { notifyError } from "./notify";

/** Asks before something that cannot be taken back, and does it. */
export function confirm(title: string, text: string, label: string, action: () => Promise<unknown>): void {
  modals.openConfirmModal({
    title,
    children: text,
    labels: { confirm: label, cancel: "Cancel" },
    confirmProps: { color: "red" },
    onConfirm: () => void action().catch(notifyError),
  });
}
