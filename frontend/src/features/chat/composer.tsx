import { ActionIcon, Group, Text, Textarea, Tooltip } from "@mantine/core";
import { useMediaQuery } from "@mantine/hooks";
import { IconArrowUp, IconPlayerStopFilled } from "@tabler/icons-react";
import { type KeyboardEvent, useRef, useState } from "react";
import { newId } from "../../api";
import { PortalError } from "../../client/errors";
import { ErrorNotice } from "../../components/error-notice";
import classes from "./composer.module.css";
import { actionOf } from "./composer-keys";
import { drafts, useDraft } from "./drafts";

interface Props {
  /** Resolves once the message is stored; the text stays in the box until then. Tried again, it is the same
   * request. */
  onSend: (message: string, requestId: string) => Promise<void>;
  /** There while an answer is running. */
  onStop?: (() => Promise<void>) | undefined;
  /** Where the draft is kept while one looks elsewhere. */
  draftKey: string;
}

/**
 * The box to write in. Enter sends, Shift+Enter begins a line, Escape stops the running answer; on a touch
 * screen Enter begins a line.
 */
export function Composer({ onSend, onStop, draftKey }: Props) {
  const [draft, setDraft] = useDraft(draftKey);
  // A message may have arrived though its answer was lost. With the same id it counts once.
  const [requestId, setRequestId] = useDraft(`${draftKey}:request`);
  const [sending, setSending] = useState(false);
  const [stopping, setStopping] = useState(false);
  const [failed, setFailed] = useState<{ error: PortalError; action: "send" | "stop" }>();
  const box = useRef<HTMLTextAreaElement>(null);
  const isTouch = useMediaQuery("(pointer: coarse)", false, { getInitialValueInEffect: false });

  const write = (text: string) => {
    setDraft(text);
    setRequestId("");
  };
  const send = async () => {
    if (draft.trim() === "" || sending) return;
    const id = requestId || newId();
    setRequestId(id);
    setSending(true);
    setFailed(undefined);
    try {
      await onSend(draft, id);
      drafts.clear(draftKey, draft);
      drafts.clear(`${draftKey}:request`, id);
    } catch (thrown) {
      setFailed({ error: PortalError.from(thrown), action: "send" });
    }
    setSending(false);
    box.current?.focus();
  };
  const stop = async () => {
    if (stopping) return;
    setStopping(true);
    setFailed(undefined);
    await onStop?.().catch((thrown: unknown) =>
      setFailed({ error: PortalError.from(thrown), action: "stop" }),
    );
    setStopping(false);
    box.current?.focus();
  };
  const actions = { send, stop };
  const onKeyDown = (event: KeyboardEvent) => {
    const action = actionOf(event.nativeEvent, isTouch);
    if (action === "send") event.preventDefault();
    if (action) void actions[action]();
  };

  return (
    <div className={classes["composer"]}>
      {failed && (
        <div className={classes["error"]}>
          <ErrorNotice error={failed.error} onRetry={actions[failed.action]} />
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
          onChange={(event) => write(event.currentTarget.value)}
          onKeyDown={onKeyDown}
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
        <Tooltip label={isTouch ? "Send" : "Send (Enter)"}>
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
        {!isTouch && "Enter sends, Shift+Enter begins a new line. "}
        Models make mistakes; check what matters.
      </Text>
    </div>
  );
}
