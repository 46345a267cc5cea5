import { Alert, Button, Stack, Text } from "@mantine/core";
import { IconAlertTriangle } from "@tabler/icons-react";
import { useState } from "react";
import { adviceFor, type PortalError } from "../client/errors";

interface Props {
  error: PortalError;
  /** Nobody can try again while that is under way. */
  onRetry?: () => unknown;
  retryLabel?: string;
}

/** What went wrong, what to do about it, and a button that does it. */
export function ErrorNotice({ error, onRetry, retryLabel = "Try again" }: Props) {
  const advice = adviceFor(error);
  const [trying, setTrying] = useState(false);
  const retry = async () => {
    setTrying(true);
    await onRetry?.();
    setTrying(false);
  };
  return (
    <Alert
      color="red"
      variant="light"
      icon={<IconAlertTriangle aria-hidden />}
      title={error.message}
      role="alert"
    >
      {(advice || onRetry) && (
        <Stack gap="xs" align="flex-start">
          {advice && <Text size="sm">{advice}</Text>}
          {onRetry && (
            <Button size="xs" variant="default" loading={trying} onClick={() => void retry()}>
              {retryLabel}
            </Button>
          )}
        </Stack>
      )}
    </Alert>
  );
}
