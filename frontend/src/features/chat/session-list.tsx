import { ActionIcon, Group, Menu, NavLink, Stack, Text, TextInput } from "@mantine/core";
import { useDebouncedValue } from "@mantine/hooks";
import { IconDots, IconPencil, IconSearch, IconTrash } from "@tabler/icons-react";
import { useState } from "react";
import { Link, useNavigate, useParams } from "react-router";
import { PortalError } from "../../client/errors";
import type { Session } from "../../client/schema";
import { ErrorNotice } from "../../components/error-notice";
import { useSessionNews, useSessions } from "../../queries/sessions";
import { useSessionActions } from "./session-actions";
import classes from "./session-list.module.css";

const SEARCH_AFTER_MS = 200;

/** The person's chats, those used last first. */
export function SessionList() {
  const [search, setSearch] = useState("");
  const [wanted] = useDebouncedValue(search.trim(), SEARCH_AFTER_MS);
  const { data, error, refetch } = useSessions(wanted);
  useSessionNews();
  const { sessionId } = useParams();
  return (
    <Stack gap={4} component="section" aria-label="Chats">
      <TextInput
        size="xs"
        aria-label="Search chats"
        placeholder="Search chats"
        leftSection={<IconSearch size={14} aria-hidden />}
        value={search}
        onChange={(event) => setSearch(event.currentTarget.value)}
      />
      {error && <ErrorNotice error={PortalError.from(error)} onRetry={() => void refetch()} />}
      {data?.sessions.map((session) => (
        <Entry key={session.session_id} session={session} isOpen={session.session_id === sessionId} />
      ))}
      {data?.sessions.length === 0 && (
        <Text size="xs" c="dimmed" px={8} py={4}>
          {wanted === "" ? "Your chats will be listed here." : "No chat has that in its title."}
        </Text>
      )}
      {data && data.total > data.sessions.length && (
        <Text size="xs" c="dimmed" px={8} py={4}>
          The latest {data.sessions.length} of {data.total}; search finds the others.
        </Text>
      )}
    </Stack>
  );
}

function Entry({ session, isOpen }: { session: Session; isOpen: boolean }) {
  const navigate = useNavigate();
  const actions = useSessionActions(session, () => {
    if (isOpen) void navigate("/chat");
  });
  return (
    <Group gap={0} wrap="nowrap" className={classes["entry"] ?? ""}>
      <NavLink
        component={Link}
        to={`/chat/${encodeURIComponent(session.session_id)}`}
        label={session.title}
        active={isOpen}
        aria-current={isOpen ? "page" : undefined}
        noWrap
        className={classes["link"] ?? ""}
      />
      <Menu position="bottom-end" shadow="md">
        <Menu.Target>
          <ActionIcon
            variant="subtle"
            color="gray"
            className={classes["menu"] ?? ""}
            aria-label={`What to do with “${session.title}”`}
          >
            <IconDots size={16} />
          </ActionIcon>
        </Menu.Target>
        <Menu.Dropdown>
          <Menu.Item leftSection={<IconPencil size={16} aria-hidden />} onClick={actions.rename}>
            Rename
          </Menu.Item>
          <Menu.Item leftSection={<IconTrash size={16} aria-hidden />} onClick={actions.remove}>
            Delete
          </Menu.Item>
        </Menu.Dropdown>
      </Menu>
    </Group>
  );
}
