import { Button, Code, Group, Modal, Stack, Text } from "@mantine/core";
import { CopyButton } from "./copy-button";

interface Props {
  title: string;
  /** What it is, and what becomes of it. */
  children: React.ReactNode;
  secret: string | undefined;
  onClose: () => void;
}

/** A secret that the portal shows this once, with a button that copies it. */
export function ShownOnce({ title, children, secret, onClose }: Props) {
  return (
    <Modal
      opened={secret !== undefined}
      onClose={onClose}
      title={title}
      closeOnClickOutside={false}
      closeOnEscape={false}
    >
      <Stack>
        <Text size="sm">{children}</Text>
        <Group wrap="nowrap" gap="xs">
          <Code block flex={1} style={{ overflowWrap: "anywhere", whiteSpace: "pre-wrap" }}>
            {secret}
          </Code>
          <CopyButton label="Copy it" text={() => secret ?? ""} />
        </Group>
        <Text size="sm" c="dimmed">
          It is shown this once. Keep it somewhere safe before you close this.
        </Text>
        <Group justify="flex-end">
          <Button onClick={onClose}>I have it</Button>
        </Group>
      </Stack>
    </Modal>
  );
}
