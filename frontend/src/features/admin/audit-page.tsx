import { Badge, Button, Code, Group, Table, Text, TextInput } from "@mantine/core";
import { useDebouncedValue } from "@mantine/hooks";
import { IconDownload, IconShieldCheck } from "@tabler/icons-react";
import { useState } from "react";
import type { AuditEntry, AuditVerdict } from "../../client/schema";
import { CopyButton } from "../../components/copy-button";
import { Loaded } from "../../components/loaded";
import { notifyError } from "../../components/notify";
import { Section } from "../../components/section";
import { WideTable } from "../../components/wide-table";
import { type AuditQuery, download, useAudit, useVerifyAudit } from "../../queries/admin";
import classes from "./admin.module.css";
import { OwnerName, useOwnerCalled } from "./owner-name";

const SEARCH_AFTER_MS = 300;
const BAD = new Set(["denied", "error"]);

export function AuditPage() {
  const [filter, setFilter] = useState<AuditQuery>({});
  const [before, setBefore] = useState<number>();
  const [wanted] = useDebouncedValue(filter, SEARCH_AFTER_MS);
  const actor = useOwnerCalled(wanted.actor);
  const verify = useVerifyAudit();
  const change = (name: keyof AuditQuery) => (event: React.ChangeEvent<HTMLInputElement>) => {
    const { [name]: _, ...others } = filter;
    const text = event.currentTarget.value.trim();
    setFilter(text === "" ? others : { ...others, [name]: text });
    setBefore(undefined);
  };
  return (
    <Section
      title="Audit log"
      aside={
        <Group gap="xs">
          <Button
            size="xs"
            variant="default"
            leftSection={<IconShieldCheck size={14} aria-hidden />}
            loading={verify.isPending}
            onClick={() => verify.mutate(undefined, { onError: notifyError })}
          >
            Verify
          </Button>
          <Button
            size="xs"
            variant="default"
            leftSection={<IconDownload size={14} aria-hidden />}
            onClick={() => download("/api/admin/audit/export", "audit.ndjson").catch(notifyError)}
          >
            Export
          </Button>
        </Group>
      }
    >
      <title>Audit · Prompt Portal</title>
      {verify.data && <Verdict verdict={verify.data} />}
      <Group grow preventGrowOverflow={false}>
        <TextInput label="Who" placeholder="a name, or user:…" onChange={change("actor")} />
        <TextInput label="What" placeholder="auth." onChange={change("action")} />
        <TextInput label="How it ended" placeholder="denied" onChange={change("outcome")} />
      </Group>
      <Entries query={actor ? { ...wanted, actor } : wanted} before={before} onOlder={setBefore} />
    </Section>
  );
}

function Verdict({ verdict }: { verdict: AuditVerdict }) {
  if (!verdict.whole) {
    return (
      <Text c="red" fw={600} role="status">
        The log is broken at row {verdict.broken_at}: {verdict.problem}.
      </Text>
    );
  }
  return (
    <Group gap="xs" role="status">
      <Text size="sm">
        The log is whole: {verdict.rows.toLocaleString()} rows. Note its head somewhere else:
      </Text>
      <Code className={classes["hash"] ?? ""}>{verdict.head}</Code>
      <CopyButton label="Copy the head" text={() => verdict.head} />
    </Group>
  );
}

interface EntriesProps {
  query: AuditQuery;
  before: number | undefined;
  onOlder: (before: number | undefined) => void;
}

function Entries({ query, before, onOlder }: EntriesProps) {
  const audit = useAudit(query, before);
  return (
    <Loaded query={audit} label="the log">
      {({ entries, next }) => (
        <>
          {entries.length === 0 && <Text size="sm">Nothing like that is in the log.</Text>}
          <WideTable label="Audit log" minWidth={900}>
            <Table.Thead>
              <Table.Tr>
                {["When", "Who", "What", "To what", "How it ended", "Details"].map((name) => (
                  <Table.Th key={name}>{name}</Table.Th>
                ))}
              </Table.Tr>
            </Table.Thead>
            <Table.Tbody>
              {entries.map((entry) => (
                <EntryRow key={entry.seq} entry={entry} />
              ))}
            </Table.Tbody>
          </WideTable>
          <Group>
            {before !== undefined && (
              <Button size="xs" variant="default" onClick={() => onOlder(undefined)}>
                Newest
              </Button>
            )}
            {next !== null && (
              <Button size="xs" variant="default" onClick={() => onOlder(next)}>
                Older
              </Button>
            )}
          </Group>
        </>
      )}
    </Loaded>
  );
}

function EntryRow({ entry }: { entry: AuditEntry }) {
  const details = Object.entries(entry.details).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
  return (
    <Table.Tr>
      <Table.Td>
        <time dateTime={entry.at} className={classes["when"]}>
          {new Date(entry.at).toLocaleString()}
        </time>
      </Table.Td>
      <Table.Td>
        <OwnerName owner={entry.actor} />
      </Table.Td>
      <Table.Td>
        {entry.action} {entry.door && <Text span c="dimmed" size="sm">{`by ${entry.door}`}</Text>}{" "}
        {entry.personal_data && (
          <Badge variant="default" tt="none" miw="max-content">
            personal data
          </Badge>
        )}
      </Table.Td>
      <Table.Td>
        <OwnerName owner={entry.target || "–"} />
      </Table.Td>
      <Table.Td>
        <Text span inherit {...(BAD.has(entry.outcome) ? { c: "red" } : {})}>
          {entry.outcome}
        </Text>
      </Table.Td>
      <Table.Td>
        <Text size="xs" c="dimmed" className={classes["hash"] ?? ""}>
          {details.join(", ")}
        </Text>
      </Table.Td>
    </Table.Tr>
  );
}
