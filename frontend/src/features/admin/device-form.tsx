import { Autocomplete, Button, Checkbox, Group, Stack, TextInput } from "@mantine/core";
import { useForm } from "@mantine/form";
import { useDebouncedValue } from "@mantine/hooks";
import { PortalError } from "../../client/errors";
import type { AddedDevice } from "../../client/schema";
import { ErrorNotice } from "../../components/error-notice";
import { SEARCH_AFTER_MS } from "../../components/search";
import { useMay } from "../../queries/access";
import { useUsers } from "../../queries/admin";
import type { useAddDevice } from "../../queries/devices";

const NAME = /^[A-Za-z0-9_.-]{1,64}$/;

interface Props {
  projects: string[];
  add: ReturnType<typeof useAddDevice>;
  onAdded: (device: AddedDevice) => void;
}

/** Adds a device. */
export function DeviceForm({ projects, add, onAdded }: Props) {
  const form = useForm({
    initialValues: { name: "", projects: [] as string[], owner: "" },
    validate: {
      name: (name) => (NAME.test(name) ? null : "Letters, digits, dots, dashes and underscores"),
      projects: (chosen) => (chosen.length > 0 ? null : "At least one is needed"),
    },
  });
  const submit = form.onSubmit(({ owner, ...device }) =>
    add.mutate({ ...device, owner: owner.trim() || null }, { onSuccess: onAdded }),
  );
  const [owner] = useDebouncedValue(form.values.owner.trim(), SEARCH_AFTER_MS);
  const { data: people } = useUsers(owner, useMay()("users:read"));
  return (
    <form onSubmit={submit}>
      <Stack>
        <TextInput
          label="Name"
          description="Its user name at the broker, and a level of its topics"
          required
          maxLength={64}
          data-autofocus
          {...form.getInputProps("name")}
        />
        <Checkbox.Group label="Projects" required {...form.getInputProps("projects")}>
          <Stack gap={6} mt={6} mb={4}>
            {projects.map((name) => (
              <Checkbox key={name} value={name} label={name} />
            ))}
          </Stack>
        </Checkbox.Group>
        <Autocomplete
          label="Owner"
          description="Whose its sessions are; empty: yours"
          data={people?.users.map((user) => user.username) ?? []}
          limit={8}
          {...form.getInputProps("owner")}
        />
        {add.error && <ErrorNotice error={PortalError.from(add.error)} />}
        <Group justify="flex-end">
          <Button type="submit" loading={add.isPending}>
            Add the device
          </Button>
        </Group>
      </Stack>
    </form>
  );
}
