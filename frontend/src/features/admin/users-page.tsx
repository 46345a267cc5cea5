import { Badge, Button, Group, Menu, NativeSelect, Table, Text, TextInput } from "@mantine/core";
import { useDebouncedValue } from "@mantine/hooks";
import { IconDots, IconSearch } from "@tabler/icons-react";
import { useState } from "react";
import type { User } from "../../client/schema";
import { Ago } from "../../components/ago";
import { confirm } from "../../components/confirm";
import { Loaded } from "../../components/loaded";
import { notifyError } from "../../components/notify";
import { SEARCH_AFTER_MS } from "../../components/search";
import { Section } from "../../components/section";
import { ShownOnce } from "../../components/shown-once";
import { WideTable } from "../../components/wide-table";
import { useMay } from "../../queries/access";
import { useChangeUser, usePasswordLink, useRoles, useSignUserOut, useUsers } from "../../queries/admin";
import classes from "./admin.module.css";
import { InvitationsSection } from "./invitations-section";
import { UserKeys } from "./user-keys";

export function UsersPage() {
  const [search, setSearch] = useState("");
  const [wanted] = useDebouncedValue(search.trim(), SEARCH_AFTER_MS);
  const users = useUsers(wanted);
  const [link, setLink] = useState<string>();
  const [keysOf, setKeysOf] = useState<User>();
  return (
    <>
      <title>Users · Prompt Portal</title>
      <Section title="Users">
        <TextInput
          aria-label="Search users"
          placeholder="Search in names and addresses"
          leftSection={<IconSearch size={16} aria-hidden />}
          value={search}
          onChange={(event) => setSearch(event.currentTarget.value)}
        />
        <Loaded query={users} label="the users">
          {(data) => (
            <>
              <WideTable label="Users" minWidth={640}>
                <Table.Thead>
                  <Table.Tr>
                    <Table.Th>Name</Table.Th>
                    <Table.Th>Role</Table.Th>
                    <Table.Th>Made</Table.Th>
                    <Table.Th>Last seen</Table.Th>
                    <Table.Th aria-label="Actions" />
                  </Table.Tr>
                </Table.Thead>
                <Table.Tbody>
                  {data.users.map((user) => (
                    <UserRow key={user.id} user={user} onLink={setLink} onKeys={setKeysOf} />
                  ))}
                </Table.Tbody>
              </WideTable>
              <Text size="sm" c="dimmed">
                {data.total === data.users.length
                  ? `${data.total} in all`
                  : `The first ${data.users.length} of ${data.total}; search finds the others.`}
              </Text>
            </>
          )}
        </Loaded>
      </Section>
      <InvitationsSection onLink={setLink} />
      <UserKeys user={keysOf} onClose={() => setKeysOf(undefined)} />
      <ShownOnce title="A link that is good once" secret={link} onClose={() => setLink(undefined)}>
        Send it to the person it is for, on a way that nobody else reads.
      </ShownOnce>
    </>
  );
}

interface RowProps {
  user: User;
  onLink: (link: string) => void;
  onKeys: (user: User) => void;
}

function UserRow({ user, onLink, onKeys }: RowProps) {
  const may = useMay();
  const canWrite = may("users:write");
  return (
    <Table.Tr>
      <Table.Td className={classes["name"] ?? ""}>
        <Group gap="xs">
          <Text fw={600}>{user.username}</Text>
          {user.closed_at && (
            <Badge color="gray" variant="light" tt="none">
              closed
            </Badge>
          )}
        </Group>
        <Text size="sm" c="dimmed">
          {user.email}
        </Text>
      </Table.Td>
      <Table.Td>{canWrite ? <RoleSelect user={user} /> : user.role}</Table.Td>
      <Table.Td>
        <Ago time={user.created_at} />
      </Table.Td>
      <Table.Td>{user.last_seen_at ? <Ago time={user.last_seen_at} /> : "never"}</Table.Td>
      <Table.Td>{canWrite && <UserMenu user={user} onLink={onLink} onKeys={onKeys} />}</Table.Td>
    </Table.Tr>
  );
}

function RoleSelect({ user }: { user: User }) {
  const { data: roles } = useRoles();
  const { mutateAsync: change, isPending } = useChangeUser();
  // Arrow keys pass through all roles, and none of them may hold for a moment by that.
  const ask = (role: string) =>
    confirm(`Give ${user.username} the role ${role}?`, "It holds at once.", "Change the role", () =>
      change({ id: user.id, role }),
    );
  const names = roles?.map((role) => role.name) ?? [];
  return (
    <NativeSelect
      aria-label={`Role of ${user.username}`}
      size="xs"
      data={names.includes(user.role) ? names : [user.role, ...names]}
      value={user.role}
      disabled={isPending}
      onChange={(event) => ask(event.currentTarget.value)}
    />
  );
}

function UserMenu({ user, onLink, onKeys }: RowProps) {
  const { mutateAsync: change } = useChangeUser();
  const { mutateAsync: makeLink } = usePasswordLink();
  const { mutateAsync: signOut } = useSignUserOut();
  const isClosed = user.closed_at !== null;
  const close = () =>
    confirm(
      `Close the account of ${user.username}?`,
      "It is signed out, and its API keys are refused. It can be opened again.",
      "Close the account",
      () => change({ id: user.id, closed: true }),
    );
  const leaveToSetPassword = () =>
    makeLink(user.id)
      .then(({ path }) => onLink(window.location.origin + path))
      .catch(notifyError);
  return (
    <Menu position="bottom-end" shadow="md">
      <Menu.Target>
        <Button size="xs" variant="subtle" color="gray" aria-label={`Actions for ${user.username}`}>
          <IconDots size={16} aria-hidden />
        </Button>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Item onClick={() => void leaveToSetPassword()}>Link for a new password</Menu.Item>
        <Menu.Item onClick={() => onKeys(user)}>API keys</Menu.Item>
        <Menu.Item onClick={() => signOut(user.id).catch(notifyError)}>Sign out everywhere</Menu.Item>
        {isClosed ? (
          <Menu.Item onClick={() => change({ id: user.id, closed: false }).catch(notifyError)}>
            Open the account
          </Menu.Item>
        ) : (
          <Menu.Item color="red" onClick={close}>
            Close the account
          </Menu.Item>
        )}
      </Menu.Dropdown>
    </Menu>
  );
}
