import { Button, Group, Modal, Text } from "@mantine/core";
import { useEffect } from "react";
import { useBlocker } from "react-router";
import { unsaved } from "../../components/unsaved";

/** Asks before a page with unsaved changes is left; `onLeave` is called where the answer is to lose them. */
export function LeaveGuard({ when, onLeave }: { when: boolean; onLeave: () => void }) {
  const blocker = useBlocker(
    ({ currentLocation, nextLocation }) => when && currentLocation.pathname !== nextLocation.pathname,
  );
  useEffect(() => {
    if (!when) return;
    const ask = (event: BeforeUnloadEvent) => event.preventDefault();
    window.addEventListener("beforeunload", ask);
    const release = unsaved.mark();
    return () => {
      window.removeEventListener("beforeunload", ask);
      release();
    };
  }, [when]);
  return (
    <Modal
      opened={blocker.state === "blocked"}
      onClose={() => blocker.reset?.()}
      title="Leave without saving?"
      closeButtonProps={{ "aria-label": "Stay" }}
    >
      <Text size="sm" mb="md">
        What you changed since the last save would be lost.
      </Text>
      <Group justify="flex-end">
        <Button variant="default" onClick={() => blocker.reset?.()} data-autofocus>
          Stay
        </Button>
        <Button
          color="red"
          onClick={() => {
            onLeave();
            blocker.proceed?.();
          }}
        >
          Leave
        </Button>
      </Group>
    </Modal>
  );
}
