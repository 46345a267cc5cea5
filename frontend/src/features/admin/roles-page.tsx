import { Badge, Button, Group, Text } from "@mantine/core";
import { useState } from "react";
import type { NamedRole } from "../../client/schema";
import { confirm } from "../../components/confirm";
import { FormModal } from "../../components/form-modal";
import { Loaded } from "../../components/loaded";
import { Section } from "../../components/section";
import { useMay } from "../../queries/access";
import { useDefineRole, useDeleteRole, useRoles } from "../../queries/admin";
import classes from "./admin.module.css";
import { limitsInWords } from "./limits-fields";
import { RoleForm } from "./role-form";

const ADMIN = "admin";
const SOURCES = { shipped: "shipped", file: "from roles.toml", api: "defined here" };

const NEW: NamedRole = {
  name: "",
  source: "api",
  description: "",
  permissions: ["chat:use", "sessions:read", "sessions:write", "account:write", "usage:read"],
  models: ["*"],
  tools: ["*"],
  system_prompt: "",
  redaction: false,
  limits: {},
};

export function RolesPage() {
  const may = useMay();
  const roles = useRoles();
  const define = useDefineRole();
  const [editing, setEditing] = useState<NamedRole>();
  const canWrite = may("roles:write");
  return (
    <Section
      title="Roles"
      aside={
        canWrite && (
          <Button size="xs" onClick={() => setEditing(NEW)}>
            New role
          </Button>
        )
      }
    >
      <title>Roles · Prompt Portal</title>
      <Loaded query={roles} label="the roles">
        {(data) =>
          data.map((role) => (
            <RoleRow
              key={role.name}
              role={role}
              onEdit={canWrite && role.name !== ADMIN ? () => setEditing(role) : undefined}
            />
          ))
        }
      </Loaded>
      <FormModal
        opened={editing !== undefined}
        onClose={() => setEditing(undefined)}
        action={define}
        title={editing?.name ? `The role ${editing.name}` : "New role"}
        size="lg"
      >
        {editing && <RoleForm role={editing} define={define} onDone={() => setEditing(undefined)} />}
      </FormModal>
    </Section>
  );
}

function RoleRow({ role, onEdit }: { role: NamedRole; onEdit: (() => void) | undefined }) {
  const { mutateAsync: remove } = useDeleteRole();
  const ask = () =>
    confirm(
      `Delete what is defined here of ${role.name}?`,
      "A role that is shipped, or in roles.toml, is then as it is there; any other is gone.",
      "Delete",
      () => remove(role.name),
    );
  return (
    <Group justify="space-between" align="flex-start">
      <div className={classes["row"]}>
        <Group gap="xs">
          <Text fw={600}>{role.name}</Text>
          <Badge variant="light" tt="none">
            {SOURCES[role.source]}
          </Badge>
        </Group>
        {role.description && <Text size="sm">{role.description}</Text>}
        <Text size="sm" c="dimmed">
          May {role.permissions.includes("*") ? "do everything" : role.permissions.join(", ") || "do nothing"}
        </Text>
        <Text size="sm" c="dimmed">
          {limitsInWords(role.limits ?? {})}
        </Text>
      </div>
      {onEdit && (
        <Group gap="xs" wrap="nowrap">
          <Button size="xs" variant="default" onClick={onEdit} aria-label={`Change the role ${role.name}`}>
            Change
          </Button>
          {role.source === "api" && (
            <Button size="xs" variant="default" onClick={ask} aria-label={`Delete the role ${role.name}`}>
              Delete
            </Button>
          )}
        </Group>
      )}
    </Group>
  );
}
