import { Button, Checkbox, Group, NativeSelect, Stack, Switch, Text, TextInput } from "@mantine/core";
import { useForm } from "@mantine/form";
import { useDisclosure } from "@mantine/hooks";
import { IconPlus } from "@tabler/icons-react";
import { useState } from "react";
import { PortalError } from "../../client/errors";
import type { Key } from "../../client/schema";
import { confirm } from "../../components/confirm";
import { DAY_MS } from "../../components/days";
import { ErrorNotice } from "../../components/error-notice";
import { FormModal } from "../../components/form-modal";
import { KeyLine } from "../../components/key-line";
import { Loaded } from "../../components/loaded";
import { Section } from "../../components/section";
import { ShownOnce } from "../../components/shown-once";
import { useKeys, useMakeKey, usePermissions, useRevokeKey } from "../../queries/access";

const LASTING = [
  { value: "", label: "until it is revoked" },
  { value: "30", label: "30 days" },
  { value: "90", label: "90 days" },
  { value: "365", label: "a year" },
];

/** What no key may do, whatever its owner may. */
const NEVER = new Set(["keys:write", "account:write", "users:write", "roles:write", "devices:write"]);
const OF_DEVICES = "chat:use";

export function KeysCard() {
  const keys = useKeys();
  const make = useMakeKey();
  const [making, { open, close }] = useDisclosure();
  const [secret, setSecret] = useState<string>();
  return (
    <Section
      title="API keys"
      aside={
        <Button size="xs" variant="default" leftSection={<IconPlus size={14} aria-hidden />} onClick={open}>
          New key
        </Button>
      }
    >
      <Text size="sm" c="dimmed">
        Programs ask with a key in your name, as <code>Authorization: Bearer pp_…</code>
      </Text>
      <Loaded query={keys} label="the keys">
        {(data) => (data.length === 0 ? <Text size="sm">You have none.</Text> : data.map(MyKey))}
      </Loaded>
      <FormModal opened={making} onClose={close} action={make} title="New key">
        <NewKeyForm
          make={make}
          onMade={(made) => {
            close();
            setSecret(made);
          }}
        />
      </FormModal>
      <ShownOnce title="Your new key" secret={secret} onClose={() => setSecret(undefined)}>
        Whoever has this key asks in your name, within its scopes.
      </ShownOnce>
    </Section>
  );
}

function MyKey(key: Key) {
  return <RevocableKey key={key.id} apiKey={key} />;
}

function RevocableKey({ apiKey }: { apiKey: Key }) {
  const { mutateAsync: revoke } = useRevokeKey();
  const ask = () =>
    confirm(`Revoke “${apiKey.name}”?`, "Programs that use it are refused from then on.", "Revoke", () =>
      revoke(apiKey.id),
    );
  return <KeyLine apiKey={apiKey} onRevoke={ask} />;
}

interface FormProps {
  make: ReturnType<typeof useMakeKey>;
  onMade: (secret: string) => void;
}

function NewKeyForm({ make, onMade }: FormProps) {
  const { data: mine } = usePermissions();
  const possible = mine?.permissions.filter((one) => one.allowed && !NEVER.has(one.name)) ?? [];
  const form = useForm({
    initialValues: { name: "", isDevice: false, device: "", project: "", days: "", scopes: [OF_DEVICES] },
    validate: {
      device: (value, { isDevice }) => (isDevice && value === "" ? "A device has a name" : null),
    },
  });
  const submit = form.onSubmit(({ name, isDevice, device, project, days, scopes }) =>
    make.mutate(
      {
        name,
        scopes: isDevice ? [OF_DEVICES] : scopes,
        device: isDevice ? device : null,
        project: project || null,
        expires_at: days === "" ? null : new Date(Date.now() + Number(days) * DAY_MS).toISOString(),
      },
      { onSuccess: (made) => onMade(made.secret) },
    ),
  );
  return (
    <form onSubmit={submit}>
      <Stack>
        <TextInput
          label="Name"
          description="What it is for"
          required
          maxLength={100}
          data-autofocus
          {...form.getInputProps("name")}
        />
        <Switch
          label="For a device that speaks MQTT"
          description="Good in the token of MQTT payloads, which others may read, and nowhere else"
          {...form.getInputProps("isDevice", { type: "checkbox" })}
        />
        {form.values.isDevice ? (
          <TextInput label="Device" required {...form.getInputProps("device")} />
        ) : (
          <Checkbox.Group label="It may" {...form.getInputProps("scopes")}>
            <Stack gap={6} mt={6}>
              {possible.map(({ name, description }) => (
                <Checkbox key={name} value={name} label={description} />
              ))}
            </Stack>
          </Checkbox.Group>
        )}
        <TextInput
          label="Project"
          description="The only one it is good for; empty for all"
          {...form.getInputProps("project")}
        />
        <NativeSelect label="Good" data={LASTING} {...form.getInputProps("days")} />
        {make.error && <ErrorNotice error={PortalError.from(make.error)} />}
        <Group justify="flex-end">
          <Button type="submit" loading={make.isPending}>
            Make the key
          </Button>
        </Group>
      </Stack>
    </form>
  );
}
