import { Badge, Button, Code, Group, Text } from "@mantine/core";
import type { Key } from "../client/schema";
import { Ago } from "./ago";

/** An API key: what it is called, what it is good for, and when it was used. */
export function KeyLine({ apiKey, onRevoke }: { apiKey: Key; onRevoke?: () => void }) {
  const { name, prefix, scopes, project, device, created_at, last_used_at, expires_at } = apiKey;
  return (
    <Group justify="space-between" wrap="nowrap" align="flex-start">
      <div>
        <Group gap="xs">
          <Text>{name}</Text>
          <Code>{prefix}…</Code>
          {device && <Mark>device {device}</Mark>}
          {project && <Mark>project {project}</Mark>}
        </Group>
        <Text size="sm" c="dimmed">
          made <Ago time={created_at} />,{" "}
          {last_used_at ? <Ago time={last_used_at} prefix="used " /> : "never used"}
          {expires_at && `, good until ${new Date(expires_at).toLocaleDateString()}`}; may {scopes.join(", ")}
        </Text>
      </div>
      {onRevoke && (
        <Button size="xs" variant="default" flex="none" onClick={onRevoke} aria-label={`Revoke ${name}`}>
          Revoke
        </Button>
      )}
    </Group>
  );
}

function Mark({ children }: { children: React.ReactNode }) {
  return (
    <Badge variant="light" tt="none">
      {children}
    </Badge>
  );
}
