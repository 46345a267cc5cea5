import { notifications } from "@mantine/notifications";
import { createElement } from "react";
import { PortalError } from "../client/errors";
import { UndoMessage } from "./undo-message";

const UNDO_MS = 8_000;

/** Tells that something failed which has no place of its own on the page. */
export function notifyError(thrown: unknown): void {
  const error = PortalError.from(thrown);
  notifications.show({ color: "red", title: "That did not work", message: error.message });
}

/** Tells what was done, and offers to take it back. */
export function notifyUndoable(message: string, undo: () => Promise<unknown>): void {
  const id = notifications.show({
    message: createElement(UndoMessage, {
      message,
      onUndo: () => {
        notifications.hide(id);
        undo().catch(notifyError);
      },
    }),
    autoClose: UNDO_MS,
  });
}
