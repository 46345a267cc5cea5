import { Button, Group, Stack, TextInput } from "@mantine/core";
import { modals } from "@mantine/modals";
import { useState } from "react";
import type { Session } from "../../client/schema";
import { notifyError, notifyUndoable } from "../../components/notify";
import { useDeleteSession, useRenameSession, useRestoreSession } from "../../queries/sessions";

const LONGEST_TITLE = 200;

/** Renaming and deleting a session; `onRemove` is called before it goes. */
export function useSessionActions(session: Session, onRemove: () => void) {
  const { mutateAsync: renameSession } = useRenameSession();
  const { mutateAsync: deleteSession } = useDeleteSession();
  const { mutateAsync: restoreSession } = useRestoreSession();
  const id = session.session_id;

  const rename = () => {
    const modal = modals.open({
      title: "Rename the chat",
      children: (
        <RenameForm
          title={session.title}
          onDone={(title) => {
            modals.close(modal);
            if (title !== undefined) renameSession({ id, title }).catch(notifyError);
          }}
        />
      ),
    });
  };
  const remove = () => {
    // A page that still showed it would say that there is no such session.
    onRemove();
    deleteSession(id)
      .then(() => notifyUndoable("The chat is deleted.", () => restoreSession(id)))
      .catch(notifyError);
  };
  return { rename, remove };
}

function RenameForm({ title, onDone }: { title: string; onDone: (title?: string) => void }) {
  const [text, setText] = useState(title);
  const chosen = text.trim();
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        if (chosen !== "") onDone(chosen);
      }}
    >
      <Stack>
        <TextInput
          label="Title"
          value={text}
          maxLength={LONGEST_TITLE}
          onChange={(event) => setText(event.currentTarget.value)}
          onFocus={(event) => event.currentTarget.select()}
          data-autofocus
        />
        <Group justify="flex-end">
          <Button variant="default" onClick={() => onDone()}>
            Cancel
          </Button>
          <Button type="submit" disabled={chosen === ""}>
            Rename
          </Button>
        </Group>
      </Stack>
    </form>
  );
}
