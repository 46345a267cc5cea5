import { ActionIcon, Affix, Badge, Button, Center, Group, Menu, Stack, Text, Title } from "@mantine/core";
import { modals } from "@mantine/modals";
import { IconArrowDown, IconDots, IconEraser, IconPencil, IconTrash } from "@tabler/icons-react";
import type { UseQueryResult } from "@tanstack/react-query";
import { Fragment, memo, useCallback, useLayoutEffect, useState } from "react";
import { Link, useNavigate, useParams } from "react-router";
import { llmAPI } from "../../api";
import { PortalError } from "../../client/errors";
import type { HistoryMessage, Session } from "../../client/schema";
import { ErrorNotice } from "../../components/error-notice";
import { NotFoundPage } from "../../components/error-pages";
import { Loading } from "../../components/loading";
import { notifyError } from "../../components/notify";
import { useClearSession, useHistory, useSession } from "../../queries/sessions";
import { Composer } from "./composer";
import classes from "./conversation.module.css";
import { Answer, LiveAnswer, Question, Stopped, SystemPrompt } from "./message";
import { ModelChoice } from "./model-choice";
import { useSessionActions } from "./session-actions";
import { useLiveTurns } from "./use-live-turns";
import { useStickToEnd } from "./use-stick-to-end";

const FIRST_SHOWN = 100;
const MORE_SHOWN = 400;

export function ConversationPage() {
  const { sessionId = "" } = useParams();
  // Another session is another page: nothing of the one before may linger in it.
  return <Conversation key={sessionId} sessionId={sessionId} />;
}

function Conversation({ sessionId }: { sessionId: string }) {
  const session = useSession(sessionId);
  const [limit, setLimit] = useState(FIRST_SHOWN);
  const history = useHistory(sessionId, limit);
  const turns = useLiveTurns();
  const messages = history.data?.messages ?? [];
  const running = messages.some((message) => message.status === "pending");
  const answers = messages.filter((message) => message.role === "assistant");
  const answered = new Set(answers.flatMap((answer) => [answer.turn_id, answer.parent_id]));
  // A message whose own turn has failed may have the answer of a later one.
  const hasAnswer = ({ id, turn_id, status }: HistoryMessage) =>
    answered.has(turn_id) || (status !== "pending" && answered.has(id));
  const { end, atEnd, scrollToEnd, keepPlace, restorePlace } = useStickToEnd(history.isSuccess);
  const first = messages[0];
  // biome-ignore lint/correctness/useExhaustiveDependencies: earlier messages are there now
  useLayoutEffect(restorePlace, [first?.id]);

  const send = async (message: string, requestId: string) => {
    await turns.send(sessionId, message, { request_id: requestId });
    scrollToEnd();
  };
  const askAgain = useCallback(
    (message: string) => turns.send(sessionId, message, {}).then(scrollToEnd, notifyError),
    [turns, sessionId, scrollToEnd],
  );
  const showEarlier = () => {
    keepPlace();
    setLimit(limit + MORE_SHOWN);
  };
  const stop = async () => {
    await llmAPI.stopSession(sessionId);
  };
  const failure = failureOf(session) ?? failureOf(history);
  if (failure?.code === "not_found") return <NotFoundPage />;
  if (failure) {
    return (
      <Center mih="60dvh" p="md">
        <ErrorNotice
          error={failure}
          onRetry={() => void Promise.all([session.refetch(), history.refetch()])}
        />
      </Center>
    );
  }
  return (
    <div className={classes["page"]}>
      <title>{`${session.data?.title ?? "Chat"} · Prompt Portal`}</title>
      {session.data && <Header session={session.data} />}
      <Stack className={classes["messages"] ?? ""} gap="lg" role="log" aria-label="Conversation">
        {first?.parent_id && (
          <Button variant="subtle" mx="auto" loading={history.isPlaceholderData} onClick={showEarlier}>
            Show earlier messages
          </Button>
        )}
        {history.isPending && <Loading mx="auto" label="Loading the conversation" />}
        {messages.map((message) => (
          <Entry
            key={message.id}
            message={message}
            sessionId={sessionId}
            hasAnswer={hasAnswer(message)}
            onAskAgain={askAgain}
          />
        ))}
        {history.isSuccess && messages.every((message) => message.role === "system") && (
          <Text c="dimmed" ta="center">
            Nothing was said here yet.
          </Text>
        )}
        <div ref={end} />
      </Stack>
      {!atEnd && (
        <Affix withinPortal={false} position={{ bottom: 120, right: 24 }}>
          <ActionIcon radius="xl" size="lg" variant="default" aria-label="To the end" onClick={scrollToEnd}>
            <IconArrowDown size={18} />
          </ActionIcon>
        </Affix>
      )}
      <div className={classes["foot"]}>
        <Composer draftKey={sessionId} onSend={send} onStop={running ? stop : undefined} />
      </div>
    </div>
  );
}

/** Why there is nothing to show. What was loaded stays, with the box to write in, when only its refreshing
 * fails for the moment; that it is not there any more is told. */
function failureOf({ data, error }: UseQueryResult<unknown>): PortalError | undefined {
  if (!error) return undefined;
  const failure = PortalError.from(error);
  return data !== undefined && failure.options.retryable ? undefined : failure;
}

// However many there are, only what has changed of them is drawn anew.
const Entry = memo(function Entry({
  message,
  sessionId,
  hasAnswer,
  onAskAgain,
}: {
  message: HistoryMessage;
  sessionId: string;
  hasAnswer: boolean;
  onAskAgain: (message: string) => Promise<void>;
}) {
  if (message.role === "system") return <SystemPrompt content={message.content} />;
  const isOver = message.status === "complete" || message.status === "cancelled";
  const live = !isOver && message.turn_id !== null && (
    <LiveAnswer
      turnId={message.turn_id}
      sessionId={sessionId}
      onAskAgain={() => onAskAgain(message.content)}
    />
  );
  if (message.role === "assistant") {
    return (
      <Fragment>
        <Answer message={message} sessionId={sessionId} />
        {live}
      </Fragment>
    );
  }
  return (
    <Fragment>
      <Question content={message.content} />
      {message.status === "cancelled" && !hasAnswer && <Stopped />}
      {!hasAnswer && live}
    </Fragment>
  );
});

function Header({ session }: { session: Session }) {
  const navigate = useNavigate();
  const actions = useSessionActions(session, () => void navigate("/chat"));
  const clear = useClearSession();
  const confirmClear = () =>
    modals.openConfirmModal({
      title: "Clear the conversation?",
      children: <Text size="sm">Its messages are deleted for good. The system prompt stays.</Text>,
      labels: { confirm: "Clear it", cancel: "Keep it" },
      confirmProps: { color: "red" },
      onConfirm: () => clear.mutate(session.session_id, { onError: notifyError }),
    });
  return (
    <Group className={classes["header"] ?? ""} justify="space-between" wrap="nowrap" gap="xs">
      <Group gap="xs" wrap="nowrap" miw={0}>
        <Title order={1} size="h5" lineClamp={1}>
          {session.title}
        </Title>
        {session.template && (
          <Badge
            component={Link}
            to={`/templates/${session.template.id}?version=${session.template.version}`}
            variant="light"
            tt="none"
            className={classes["template"] ?? ""}
          >
            {session.template.title} v{session.template.version}
          </Badge>
        )}
      </Group>
      <Group gap="xs" wrap="nowrap">
        <ModelChoice />
        <Menu position="bottom-end" shadow="md">
          <Menu.Target>
            <ActionIcon variant="subtle" color="gray" aria-label="What to do with this chat">
              <IconDots size={18} />
            </ActionIcon>
          </Menu.Target>
          <Menu.Dropdown>
            <Menu.Item leftSection={<IconPencil size={16} aria-hidden />} onClick={actions.rename}>
              Rename
            </Menu.Item>
            <Menu.Item leftSection={<IconEraser size={16} aria-hidden />} onClick={confirmClear}>
              Clear
            </Menu.Item>
            <Menu.Item leftSection={<IconTrash size={16} aria-hidden />} onClick={actions.remove}>
              Delete
            </Menu.Item>
          </Menu.Dropdown>
        </Menu>
      </Group>
    </Group>
  );
}
