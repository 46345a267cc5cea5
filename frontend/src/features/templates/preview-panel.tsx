import { Group, Stack, Text } from "@mantine/core";
import { useDebouncedValue } from "@mantine/hooks";
import { useState } from "react";
import { PortalError } from "../../client/errors";
import { CopyButton } from "../../components/copy-button";
import { ErrorNotice } from "../../components/error-notice";
import { VariableInputs } from "../../components/variable-inputs";
import { usePreview, type Variables } from "../../queries/templates";
import classes from "./templates.module.css";

const PREVIEW_AFTER_MS = 250;

/** The prompt that the text makes with values that one can try. */
export function PreviewPanel({ content }: { content: string }) {
  const [variables, setVariables] = useState<Variables>({});
  const [asked] = useDebouncedValue({ content, variables }, PREVIEW_AFTER_MS);
  const { data, error } = usePreview(asked.content, asked.variables);
  if (content === "") return <Text c="dimmed">The prompt is shown here as you write.</Text>;
  return (
    <Stack gap="sm">
      <VariableInputs
        names={data?.variables ?? []}
        optional={data?.optional ?? []}
        values={variables}
        onChange={setVariables}
      />
      {error && <ErrorNotice error={PortalError.from(error)} />}
      {data && (
        <div>
          <Group justify="space-between">
            <Text size="sm" fw={500} id="prompt-label">
              Prompt
            </Text>
            <CopyButton label="Copy the prompt" text={() => data.prompt ?? ""} />
          </Group>
          {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keyboard */}
          <section className={classes["prompt"]} aria-labelledby="prompt-label" tabIndex={0}>
            <Marked text={data.prompt ?? ""} names={data.missing} />
          </section>
        </div>
      )}
    </Stack>
  );
}

/** The prompt with the places marked whose variables have no value yet. */
function Marked({ text, names }: { text: string; names: string[] }) {
  if (names.length === 0) return text;
  const marks = new Set(names.map((name) => `‹${name}›`));
  const pieces = text.split(/(‹[^‹›]*›)/);
  return pieces.map((piece, place) =>
    // biome-ignore lint/suspicious/noArrayIndexKey: the pieces have no other identity than their place
    marks.has(piece) ? <mark key={place}>{piece}</mark> : piece,
  );
}
