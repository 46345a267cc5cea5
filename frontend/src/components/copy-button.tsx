import { ActionIcon, Tooltip } from "@mantine/core";
import { useTimeout } from "@mantine/hooks";
import { IconCheck, IconCopy } from "@tabler/icons-react";
import { useState } from "react";
import { copy } from "./clipboard";
import { notifyError } from "./notify";

const COPIED_MS = 1500;

export function CopyButton({ label, text }: { label: string; text: () => string }) {
  const [isCopied, setCopied] = useState(false);
  const { start } = useTimeout(() => setCopied(false), COPIED_MS);
  const onClick = () =>
    copy(text())
      .then(() => {
        setCopied(true);
        start();
      })
      .catch(notifyError);
  return (
    <Tooltip label={isCopied ? "Copied" : label}>
      <ActionIcon
        variant="subtle"
        color="gray"
        size="md"
        aria-label={isCopied ? "Copied" : label}
        onClick={onClick}
      >
        {isCopied ? <IconCheck size={16} /> : <IconCopy size={16} />}
      </ActionIcon>
    </Tooltip>
  );
}
