import { Badge, Box, Group, Loader, Paper, Stack, Text, UnstyledButton } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { IconBrain, IconChevronRight, IconFileText } from "@tabler/icons-react";
import type { ReactNode } from "react";
import { PortalError } from "../../client/errors";
import type { HistoryMessage } from "../../client/schema";
import { CopyButton } from "../../components/copy-button";
import { ErrorNotice } from "../../components/error-notice";
import { Markdown } from "../../components/markdown";
import type { LiveTurn } from "./live-turn";
import classes from "./message.module.css";
import { useLiveTurn, useLiveTurns } from "./use-live-turns";

/** A message of the person. */
export function Question({ content }: { content: string }) {
  return (
    <article className={classes["question"]} aria-label="You">
      {content}
    </article>
  );
}

/** An answer that is stored. Its reasoning is fetched when it is unfolded. */
export function Answer({ message, sessionId }: { message: HistoryMessage; sessionId: string }) {
  const hasReasoning = (message.usage?.reasoning_tokens ?? 0) > 0 && message.turn_id !== null;
  return (
    <article className={classes["answer"]} aria-label="The model">
      {hasReasoning && (
        <Fold label="Reasoning" icon={<IconBrain size={16} aria-hidden />}>
          <StoredReasoning turnId={message.turn_id ?? ""} sessionId={sessionId} />
        </Fold>
      )}
      {message.content === "" && !message.tool_calls?.length ? (
        <Text c="dimmed">The model has written no answer.</Text>
      ) : (
        <Markdown text={message.content} />
      )}
      <Group gap={4} className={classes["actions"] ?? ""}>
        <CopyButton label="Copy the answer" text={() => message.content} />
        {message.status === "cancelled" && <Stopped />}
        {message.status === "failed" && <Mark>Broken off</Mark>}
        {message.finish_reason === "length" && <Mark>Cut at its longest</Mark>}
      </Group>
    </article>
  );
}

/** The mark of an answer that was stopped, perhaps before it began. */
export function Stopped() {
  return <Mark>Stopped</Mark>;
}

function Mark({ children }: { children: string }) {
  return (
    <Badge variant="default" size="sm" tt="none">
      {children}
    </Badge>
  );
}

function StoredReasoning({ turnId, sessionId }: { turnId: string; sessionId: string }) {
  const turn = useLiveTurn(turnId, sessionId);
  if (turn?.state === "lost") return <Lost turn={turn} />;
  if (turn?.error?.code === "not_found") return <Text size="sm">It is no longer there.</Text>;
  return <Reasoning text={turn?.thinking ?? ""} />;
}

/** Says why a turn cannot be followed, which perhaps goes on at the portal. */
function Lost({ turn }: { turn: LiveTurn }) {
  const turns = useLiveTurns();
  return turn.error && <ErrorNotice error={turn.error} onRetry={() => turns.again(turn.turnId)} />;
}

function Reasoning({ text }: { text: string }) {
  return (
    <Text size="sm" c="dimmed" className={classes["plain"] ?? ""}>
      {text}
    </Text>
  );
}

/** The answer of a turn that goes on, or that failed. `onAskAgain` sends its message once more. */
export function LiveAnswer({
  turnId,
  sessionId,
  onAskAgain,
}: {
  turnId: string;
  sessionId: string;
  onAskAgain: () => Promise<void>;
}) {
  const turn = useLiveTurn(turnId, sessionId);
  if (turn === undefined) return null;
  if (turn.state === "lost") return <Lost turn={turn} />;
  if (turn.error) {
    const gone = turn.error.code === "not_found";
    const error = gone ? new PortalError("gone", "This message was not answered.") : turn.error;
    return <ErrorNotice error={error} onRetry={onAskAgain} retryLabel="Ask again" />;
  }
  return (
    <article className={classes["answer"]} aria-label="The model" aria-busy={turn.state !== "ended"}>
      {turn.thinking !== "" && (
        <Fold
          label={turn.state === "thinking" ? "Thinking …" : "Reasoning"}
          icon={<IconBrain size={16} aria-hidden />}
        >
          <Reasoning text={turn.thinking} />
        </Fold>
      )}
      {turn.response === "" ? <Waiting turn={turn} /> : <Markdown text={turn.response} />}
    </article>
  );
}

function Waiting({ turn }: { turn: LiveTurn }) {
  const seconds = Math.max(1, Math.round(turn.etaS));
  const words =
    turn.state === "queued"
      ? `Number ${turn.position} in the queue, about ${seconds} s`
      : turn.state === "thinking"
        ? "Thinking …"
        : "Waiting for the model …";
  return (
    <Group gap="xs" role="status">
      <Loader type="dots" size="sm" aria-hidden />
      <Text size="sm" c="dimmed">
        {words}
      </Text>
    </Group>
  );
}

/** What the model was told before the first message. */
export function SystemPrompt({ content }: { content: string }) {
  return (
    <Paper withBorder p="xs" radius="md">
      <Fold label="System prompt" icon={<IconFileText size={16} aria-hidden />}>
        <Text size="sm" className={classes["plain"] ?? ""}>
          {content}
        </Text>
      </Fold>
    </Paper>
  );
}

function Fold({ label, icon, children }: { label: string; icon: ReactNode; children: ReactNode }) {
  const [opened, { toggle }] = useDisclosure();
  return (
    <Stack gap={6} mb={4}>
      <UnstyledButton onClick={toggle} aria-expanded={opened} className={classes["fold"] ?? ""}>
        <Group gap={6} wrap="nowrap">
          <IconChevronRight size={14} aria-hidden className={classes["chevron"] ?? ""} data-opened={opened} />
          {icon}
          <Text size="sm" c="dimmed">
            {label}
          </Text>
        </Group>
      </UnstyledButton>
      {opened && <Box className={classes["folded"] ?? ""}>{children}</Box>}
    </Stack>
  );
}
