import { Button, Center, Stack, Text, Title } from "@mantine/core";
import { Link, useRouteError } from "react-router";

export function NotFoundPage() {
  return (
    <Message title="There is nothing here" text="The address may be mistyped, or what was here is gone." />
  );
}

/** Shown when a page fails: a defect of the portal, or a part of it that could not be loaded. */
export function RouteError() {
  const error = useRouteError();
  return (
    <Message
      title="This page failed"
      text={`Load it again; if it stays, the portal may have been updated under it. (${String(error)})`}
    />
  );
}

function Message({ title, text }: { title: string; text: string }) {
  return (
    <Center mih="60vh" p="md">
      <Stack align="center" ta="center" gap="sm" maw={480}>
        <Title order={1} size="h2">
          {title}
        </Title>
        <Text c="dimmed">{text}</Text>
        <Button component={Link} to="/chat" reloadDocument variant="light">
          Go to the chat
        </Button>
      </Stack>
    </Center>
  );
}
