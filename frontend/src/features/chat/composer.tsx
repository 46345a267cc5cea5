import { ActionIcon, Group, Text, Textarea, Tooltip } from "@mantine/core";
import { IconArrowUp, IconPlayerStopFilled } from "@tabler/icons-react";
import { type KeyboardEvent, useRef, useState } from "react";
import { PortalError } from "../../client/errors";
import { ErrorNotice } from "../../components/error-notice";
import classes from "./composer.module.css";

interface Props {
  /** Resolves once the message is stored; the text stays in the box until then. */
  onSend: (message: string) => Promise<void>;
  /** There while an answer is running. */
  onStop?: (() => Promise<void>) | undefined;
  /** Where the draft is kept while one looks elsewhere. */
  draftKey: string;
}

/** The box to write in. Enter sends, Shift+Enter begins a line, Escape stops the running answer. */
export function Composer({ onSend, onStop, draftKey }: Props) {
  const [draft, setDraft] = useDraft(draftKey);
  const [sending, setSending] = useState(false);
  const [stopping, setStopping] = useState(false);
  const [error, setError] = useState<PortalError>();
  const box = useRef<HTMLTextAreaElement>(null);

  const send = async () => {
    if (draft.trim() === "" || sending) return;
    setSending(true);
    setError(undefined);
    try {
      await onSend(draft);
      setDraft("");
    } catch (thrown) {
      setError(PortalError.from(thrown));
    }
    setSending(false);
    box.current?.focus();
  };
  const stop = async () => {
    if (onStop === undefined || stopping) return;
    setStopping(true);
    await onStop().catch((thrown: unknown) => setError(PortalError.from(thrown)));
    setStopping(false);
    box.current?.focus();
  };
  const onKeyDown = (event: KeyboardEvent) => {
    // While a word is being composed, Enter and Escape belong to the input method.
    if (event.nativeEvent.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      void send();
    } else if (event.key === "Escape") {
      void stop();
    }
  };

  return (
    <div className={classes["composer"]}>
      {error && (
        <div className={classes["error"]}>
          <ErrorNotice error={error} onRetry={() => void send()} />
        </div>
      )}
      <Group gap="xs" wrap="nowrap" align="flex-end" className={classes["frame"] ?? ""}>
        <Textarea
          ref={box}
          aria-label="Message"
          placeholder="Write a message"
          variant="unstyled"
          autosize
          minRows={1}
          maxRows={12}
          flex={1}
          value={draft}
          onChange={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={onKeyDown}
          data-autofocus
          autoFocus
        />
        {onStop && (
          <Tooltip label="Stop the answer (Esc)">
            <ActionIcon
              size={36}
              radius="xl"
              variant="default"
              aria-label="Stop the answer"
              loading={stopping}
              onClick={() => void stop()}
            >
              <IconPlayerStopFilled size={16} />
            </ActionIcon>
          </Tooltip>
        )}
        <Tooltip label="Send (Enter)">
          <ActionIcon
            size={36}
            radius="xl"
            aria-label="Send"
            loading={sending}
            disabled={draft.trim() === ""}
            onClick={() => void send()}
          >
            <IconArrowUp size={20} />
          </ActionIcon>
        </Tooltip>
      </Group>
      <Text size="xs" c="dimmed" ta="center" mt={6} visibleFrom="sm">
        Enter sends, Shift+Enter begins a new line. Models make mistakes; check what matters.
      </Text>
    </div>
  );
}

/** A text that survives a reload of the page, but not the tab. */
function useDraft(key: string): [string, (text: string) => void] {
  const name = `draft:${key}`;
  const [draft, setDraft] = useState(() => sessionStorage.getItem(name) ?? "");
  const change = (text: string) => {
    setDraft(text);
    if (text === "") sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, text);
  };
  return [draft, change];
}
