import { Alert, Button, Stack, Text } from "@mantine/core";
import { IconAlertTriangle } from "@tabler/icons-react";
import { adviceFor, type PortalError } from "../client/errors";

interface Props {
  error: PortalError;
  onRetry?: () => void;
  retryLabel?: string;
}

/** What went wrong, what to do about it, and a button that does it. */
export function ErrorNotice({ error, onRetry, retryLabel = "Try again" }: Props) {
  const advice = adviceFor(error);
  return (
    <Alert
      color="red"
      variant="light"
      icon={<IconAlertTriangle aria-hidden />}
      title={error.message}
      role="alert"
    >
      <Stack gap="xs" align="flex-start">
        {advice && <Text size="sm">{advice}</Text>}
        {onRetry && (
          <Button size="xs" variant="default" onClick={onRetry}>
            {retryLabel}
          </Button>
        )}
      </Stack>
    </Alert>
  );
}
