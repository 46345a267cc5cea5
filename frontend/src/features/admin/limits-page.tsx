import { Button, Group, NativeSelect, Stack, Text, TextInput } from "@mantine/core";
import { useState } from "react";
import { PortalError } from "../../client/errors";
import type { SubjectLimits } from "../../client/schema";
import { confirm } from "../../components/confirm";
import { ErrorNotice } from "../../components/error-notice";
import { FormModal } from "../../components/form-modal";
import { Loaded } from "../../components/loaded";
import { SearchSelect } from "../../components/search-select";
import { Section } from "../../components/section";
import { useMay } from "../../queries/access";
import { useClearLimits, useLimits, useSetLimits, useUsers } from "../../queries/admin";
import classes from "./admin.module.css";
import { LimitsFields, limitsInWords } from "./limits-fields";
import { OwnerName } from "./owner-name";

const KINDS = [
  { value: "user", label: "A person" },
  { value: "project", label: "A project" },
  { value: "key", label: "An API key" },
  { value: "device", label: "A device" },
  { value: "anon", label: "MQTT clients without a token, of a project" },
  { value: "all", label: "Everybody together" },
];

const NEW: SubjectLimits = { subject: "", limits: {} };

export function LimitsPage() {
  const may = useMay();
  const limits = useLimits();
  const set = useSetLimits();
  const [editing, setEditing] = useState<SubjectLimits>();
  const canWrite = may("roles:write");
  return (
    <Section
      title="Limits and budgets"
      aside={
        canWrite && (
          <Button size="xs" onClick={() => setEditing(NEW)}>
            New limits
          </Button>
        )
      }
    >
      <title>Limits · Prompt Portal</title>
      <Text size="sm" c="dimmed">
        What is set here goes before the limits of roles and settings. Days and months are those of UTC.
      </Text>
      <Loaded query={limits} label="the limits">
        {(data) =>
          data.length === 0 ? (
            <Text size="sm">None are set for anybody in particular.</Text>
          ) : (
            data.map((one) => (
              <LimitsRow key={one.subject} {...one} onEdit={canWrite ? () => setEditing(one) : undefined} />
            ))
          )
        }
      </Loaded>
      <FormModal
        opened={editing !== undefined}
        onClose={() => setEditing(undefined)}
        action={set}
        title={editing?.subject ? "Change limits" : "New limits"}
      >
        {editing && <LimitsForm {...editing} set={set} onDone={() => setEditing(undefined)} />}
      </FormModal>
    </Section>
  );
}

function LimitsRow({ subject, limits, onEdit }: SubjectLimits & { onEdit: (() => void) | undefined }) {
  const { mutateAsync: clear } = useClearLimits();
  const remove = () =>
    confirm("Take these limits away?", "Those of roles and settings hold then.", "Take away", () =>
      clear(subject),
    );
  return (
    <Group justify="space-between" align="flex-start">
      <div className={classes["row"]}>
        <Text fw={600}>
          <OwnerName owner={subject} />
        </Text>
        <Text size="sm" c="dimmed">
          {limitsInWords(limits)}
        </Text>
      </div>
      {onEdit && (
        <Group gap="xs" wrap="nowrap">
          <Button size="xs" variant="default" onClick={onEdit} aria-label={`Change the limits of ${subject}`}>
            Change
          </Button>
          <Button
            size="xs"
            variant="default"
            onClick={remove}
            aria-label={`Take away the limits of ${subject}`}
          >
            Take away
          </Button>
        </Group>
      )}
    </Group>
  );
}

interface FormProps extends SubjectLimits {
  set: ReturnType<typeof useSetLimits>;
  onDone: () => void;
}

function LimitsForm({ subject, limits: before, set, onDone }: FormProps) {
  const [whose, setWhose] = useState(subject);
  const [limits, setLimits] = useState(before);
  const submit = (event: React.FormEvent) => {
    event.preventDefault();
    set.mutate({ subject: whose, limits }, { onSuccess: onDone });
  };
  return (
    <form onSubmit={submit}>
      <Stack>
        {subject ? <OwnerName owner={subject} /> : <SubjectFields onChange={setWhose} />}
        <Text size="sm" c="dimmed">
          An empty field leaves the limit to the next wider rule; 0 switches it off.
        </Text>
        <LimitsFields limits={limits} onChange={setLimits} />
        {set.error && <ErrorNotice error={PortalError.from(set.error)} />}
        <Group justify="flex-end">
          <Button type="submit" loading={set.isPending} disabled={whose === ""}>
            Save
          </Button>
        </Group>
      </Stack>
    </form>
  );
}

function SubjectFields({ onChange }: { onChange: (subject: string) => void }) {
  const [kind, setKind] = useState("user");
  const choose = (next: string, name: string) => {
    setKind(next);
    onChange(next === "all" ? "all" : name && `${next}:${name}`);
  };
  return (
    <>
      <NativeSelect
        label="For"
        data={KINDS}
        value={kind}
        onChange={(event) => choose(event.currentTarget.value, "")}
      />
      {kind === "user" && <PersonSelect onChange={(id) => choose(kind, id)} />}
      {kind !== "user" && kind !== "all" && (
        <TextInput
          label={kind === "key" ? "Id of the key" : "Name"}
          required
          onChange={(event) => choose(kind, event.currentTarget.value.trim())}
        />
      )}
    </>
  );
}

function PersonSelect({ onChange }: { onChange: (id: string) => void }) {
  const [wanted, setWanted] = useState("");
  const { data } = useUsers(wanted);
  const [chosen, setChosen] = useState<{ value: string; label: string }>();
  const found = data?.users.map(({ id, username }) => ({ value: id, label: username })) ?? [];
  const others = found.filter(({ value }) => value !== chosen?.value);
  return (
    <SearchSelect
      label="Person"
      required
      nothingFoundMessage="Nobody is called that"
      data={chosen ? [chosen, ...others] : found}
      value={chosen?.value ?? null}
      onSearch={setWanted}
      onChange={(id, option) => {
        setChosen(option ?? undefined);
        onChange(id ?? "");
      }}
    />
  );
}
