import { Group, Text, Tooltip } from "@mantine/core";
import { useHealth } from "../queries/account";
import classes from "./model-status.module.css";

const WORDS = { ok: "The model answers", degraded: "The model is slow or busy", down: "The model is away" };

/** Which model answers, and whether it does. */
export function ModelStatus() {
  const { data, isError } = useHealth();
  const status = isError ? "down" : data?.status;
  if (status === undefined) return null;
  const words = isError ? "The portal does not answer" : WORDS[status];
  return (
    <Tooltip label={words} openDelay={300}>
      <Group gap={8} px={8} py={4} wrap="nowrap" role="status">
        <span className={classes["dot"]} data-status={status} aria-hidden />
        <Text size="xs" c="dimmed" truncate>
          {status === "ok" ? (data?.model ?? words) : words}
        </Text>
      </Group>
    </Tooltip>
  );
}
