import { Button, Checkbox, Group, Stack, Switch, TagsInput, Textarea, TextInput, Title } from "@mantine/core";
import { useForm } from "@mantine/form";
import { PortalError } from "../../client/errors";
import type { NamedRole } from "../../client/schema";
import { ErrorNotice } from "../../components/error-notice";
import { usePermissions } from "../../queries/access";
import type { useDefineRole } from "../../queries/admin";
import { LimitsFields } from "./limits-fields";

interface Props {
  role: NamedRole;
  define: ReturnType<typeof useDefineRole>;
  onDone: () => void;
}

/** Defines a role, or changes one. */
export function RoleForm({ role, define, onDone }: Props) {
  const { data } = usePermissions();
  const all = data?.permissions ?? [];
  const before = spelledOut(
    role.permissions,
    all.map((one) => one.name),
  );
  const form = useForm({
    initialValues: { ...role, limits: role.limits ?? {}, permissions: before },
    validate: {
      name: (name) =>
        /^[a-z][a-z0-9_-]{0,63}$/.test(name) ? null : "Small letters, digits, dashes and underscores",
    },
  });
  const submit = form.onSubmit(({ name, source: _, permissions: chosen, ...definition }) => {
    // Left as they were, `chat:*` and `*` go on standing for what is added later.
    const isSame = chosen.length === before.length && before.every((one) => chosen.includes(one));
    const permissions = isSame ? role.permissions : chosen;
    define.mutate({ name, role: { ...definition, permissions } }, { onSuccess: onDone });
  });
  return (
    <form onSubmit={submit}>
      <Stack>
        {role.name === "" && (
          <TextInput label="Name" required data-autofocus {...form.getInputProps("name")} />
        )}
        <TextInput label="Description" maxLength={500} {...form.getInputProps("description")} />
        <Checkbox.Group label="Its people may" {...form.getInputProps("permissions")}>
          <Stack gap={6} mt={6}>
            {all.map(({ name, description }) => (
              <Checkbox key={name} value={name} label={description} />
            ))}
          </Stack>
        </Checkbox.Group>
        <TagsInput
          label="Models that they may ask for"
          description="* stands for anything"
          {...form.getInputProps("models")}
        />
        <TagsInput
          label="Tools that they may offer to the model"
          description="* stands for anything"
          {...form.getInputProps("tools")}
        />
        <Textarea
          label="System prompt"
          description="Put before the system prompt of each of their sessions"
          autosize
          minRows={2}
          maxRows={10}
          {...form.getInputProps("system_prompt")}
        />
        <Switch
          label="Mask personal data in their messages"
          description="Before they are stored or sent to the model"
          {...form.getInputProps("redaction", { type: "checkbox" })}
        />
        <Title order={3} size="h5">
          Limits
        </Title>
        <LimitsFields
          limits={form.values.limits ?? {}}
          onChange={(limits) => form.setFieldValue("limits", limits)}
        />
        {define.error && <ErrorNotice error={PortalError.from(define.error)} />}
        <Group justify="flex-end">
          <Button type="submit" loading={define.isPending}>
            Save
          </Button>
        </Group>
      </Stack>
    </form>
  );
}

/** The permissions, with `chat:*` and `*` as the single ones that they stand for. */
function spelledOut(permissions: string[], all: string[]): string[] {
  const stands = (name: string) =>
    permissions.some((one) => one === name || one === "*" || one === `${name.split(":")[0]}:*`);
  return all.filter(stands);
}
