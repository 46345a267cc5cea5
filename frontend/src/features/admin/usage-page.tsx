import { Button, Checkbox, Group, Stack, Table, Text, TextInput } from "@mantine/core";
import { IconDownload } from "@tabler/icons-react";
import { useState } from "react";
import type { UsageLine } from "../../client/schema";
import { Ago } from "../../components/ago";
import { DayChart, everyDay } from "../../components/day-chart";
import { Loaded } from "../../components/loaded";
import { notifyError } from "../../components/notify";
import { Section } from "../../components/section";
import { WideTable } from "../../components/wide-table";
import { download, type Group as Grouping, usageCsv, useAlerts, useUsage } from "../../queries/admin";
import { OwnerName } from "./owner-name";

const DAY_MS = 86_400_000;
const DAYS = 30;
const GROUPS: { value: Grouping; label: string }[] = [
  { value: "day", label: "Day" },
  { value: "owner", label: "Person" },
  { value: "project", label: "Project" },
  { value: "model", label: "Model" },
  { value: "door", label: "Door" },
  { value: "api_key", label: "API key" },
];

const dayOf = (at: number) => new Date(at).toISOString().slice(0, 10);

export function UsagePage() {
  const [since, setSince] = useState(() => dayOf(Date.now() - (DAYS - 1) * DAY_MS));
  const [until, setUntil] = useState(() => dayOf(Date.now()));
  const [by, setBy] = useState<Grouping[]>(["owner"]);
  const query = { since, until, by };
  return (
    <>
      <title>Usage · Prompt Portal</title>
      <Section
        title="Usage"
        aside={
          <Button
            size="xs"
            variant="default"
            leftSection={<IconDownload size={14} aria-hidden />}
            onClick={() => download(usageCsv(query), "usage.csv").catch(notifyError)}
          >
            CSV
          </Button>
        }
      >
        <Group align="flex-end">
          <TextInput
            label="From"
            type="date"
            value={since}
            max={until}
            onChange={(event) => event.currentTarget.value && setSince(event.currentTarget.value)}
          />
          <TextInput
            label="To"
            type="date"
            value={until}
            min={since}
            onChange={(event) => event.currentTarget.value && setUntil(event.currentTarget.value)}
          />
        </Group>
        <Checkbox.Group
          label="Sum by"
          value={by}
          onChange={(chosen) => setBy(GROUPS.map(({ value }) => value).filter((one) => chosen.includes(one)))}
        >
          <Group mt={6}>
            {GROUPS.map((group) => (
              <Checkbox key={group.value} {...group} />
            ))}
          </Group>
        </Checkbox.Group>
        <ByDay since={since} until={until} />
        <Lines since={since} until={until} by={by.length === 0 ? ["day"] : by} />
      </Section>
      <AlertsSection />
    </>
  );
}

function ByDay({ since, until }: { since: string; until: string }) {
  const { data } = useUsage({ since, until, by: ["day"] });
  const tokens = new Map(data?.lines.map((line) => [line.day ?? "", tokensOf(line)]));
  return <DayChart title="Tokens a day" unit="tokens" days={everyDay(since, until, tokens)} />;
}

function tokensOf(line: UsageLine): number {
  return line.prompt_tokens + line.completion_tokens;
}

function Lines({ since, until, by }: { since: string; until: string; by: Grouping[] }) {
  const usage = useUsage({ since, until, by });
  const columns = GROUPS.filter(({ value }) => by.includes(value));
  return (
    <Loaded query={usage} label="the usage">
      {({ lines }) =>
        lines.length === 0 ? (
          <Text size="sm">Nothing was used in this time.</Text>
        ) : (
          <WideTable label="Usage" minWidth={560}>
            <Table.Thead>
              <Table.Tr>
                {columns.map(({ value, label }) => (
                  <Table.Th key={value}>{label}</Table.Th>
                ))}
                {["Messages", "Read", "Written", "GPU s", "Cost"].map((name) => (
                  <Table.Th key={name} ta="right">
                    {name}
                  </Table.Th>
                ))}
              </Table.Tr>
            </Table.Thead>
            <Table.Tbody>
              {lines.map((line) => (
                <Line
                  key={columns.map(({ value }) => line[value]).join("\n")}
                  line={line}
                  columns={columns}
                />
              ))}
            </Table.Tbody>
          </WideTable>
        )
      }
    </Loaded>
  );
}

function Line({ line, columns }: { line: UsageLine; columns: { value: Grouping }[] }) {
  const numbers = [
    line.turns.toLocaleString(),
    line.prompt_tokens.toLocaleString(),
    line.completion_tokens.toLocaleString(),
    line.gpu_seconds.toFixed(1),
    line.cost.toFixed(4),
  ];
  return (
    <Table.Tr>
      {columns.map(({ value }) => (
        <Table.Td key={value}>
          {value === "owner" ? <OwnerName owner={line.owner ?? ""} /> : line[value] || "none"}
        </Table.Td>
      ))}
      {numbers.map((number, index) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: the columns are always the same
        <Table.Td key={index} ta="right">
          {number}
        </Table.Td>
      ))}
    </Table.Tr>
  );
}

function AlertsSection() {
  const alerts = useAlerts();
  return (
    <Section title="Alerts">
      <Loaded query={alerts} label="the alerts">
        {(data) =>
          data.length === 0 ? (
            <Text size="sm" c="dimmed">
              No budget came near its end.
            </Text>
          ) : (
            <Stack gap={4}>
              {data.map((alert) => (
                <Text size="sm" key={`${alert.subject} ${alert.budget} ${alert.period} ${alert.percent}`}>
                  <OwnerName owner={alert.subject} />: {alert.percent} % of the{" "}
                  {alert.budget.replaceAll("_", " ")} ({alert.amount.toLocaleString()}) of {alert.period} were
                  spent <Ago time={alert.at} />
                </Text>
              ))}
            </Stack>
          )
        }
      </Loaded>
    </Section>
  );
}
