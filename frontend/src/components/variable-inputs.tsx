import { Stack, Textarea } from "@mantine/core";
import type { Variables } from "../queries/templates";

interface Props {
  names: string[];
  optional: string[];
  values: Variables;
  onChange: (values: Variables) => void;
}

/** An input for each variable of a template. One that is empty has no value. */
export function VariableInputs({ names, optional, values, onChange }: Props) {
  const change = (name: string, text: string) => {
    const { [name]: _, ...others } = values;
    onChange(text === "" ? others : { ...others, [name]: text });
  };
  return (
    <Stack gap="xs">
      {[...names, ...optional].map((name) => (
        <Textarea
          key={name}
          label={optional.includes(name) ? `${name} (optional)` : name}
          autosize
          minRows={1}
          maxRows={6}
          value={values[name] ?? ""}
          onChange={(event) => change(name, event.currentTarget.value)}
        />
      ))}
    </Stack>
  );
}
