import { Button, Checkbox, Group, Stack, Table, Text, TextInput } from "@mantine/core";
import { IconDownload } from "@tabler/icons-react";
import { useState } from "react";
import type { UsageLine } from "../../client/schema";
import { Ago } from "../../components/ago";
import { DayChart } from "../../components/day-chart";
import { DAY_MS, dayOf } from "../../components/days";
import { Loaded } from "../../components/loaded";
import { notifyError } from "../../components/notify";
import { Section } from "../../components/section";
import { WideTable } from "../../components/wide-table";
import {
  download,
  type Group as Grouping,
  type UsageQuery,
  usageCsv,
  useAlerts,
  useUsage,
} from "../../queries/admin";
import { type DateRange, FIRST_DAY, isRange, LAST_DAY } from "./date-range";
import { OwnerName } from "./owner-name";

const DAYS = 30;
const GROUPS: { value: Grouping; label: string }[] = [
  { value: "day", label: "Day" },
  { value: "owner", label: "Person" },
  { value: "project", label: "Project" },
  { value: "model", label: "Model" },
  { value: "door", label: "Door" },
  { value: "api_key", label: "API key" },
];

export function UsagePage() {
  const [range, setRange] = useState(lastDays);
  const [typed, setTyped] = useState(range);
  const [by, setBy] = useState<Grouping[]>(["owner"]);
  const type = (change: Partial<DateRange>) => {
    const next = { ...typed, ...change };
    setTyped(next);
    if (isRange(next)) setRange(next);
  };
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
            onClick={() => download(usageCsv({ ...range, by }), "usage.csv").catch(notifyError)}
          >
            CSV
          </Button>
        }
      >
        <Group align="flex-end">
          <TextInput
            label="From"
            type="date"
            value={typed.since}
            min={FIRST_DAY}
            max={range.until}
            error={!isRange(typed)}
            onChange={(event) => type({ since: event.currentTarget.value })}
          />
          <TextInput
            label="To"
            type="date"
            value={typed.until}
            min={range.since}
            max={LAST_DAY}
            error={!isRange(typed)}
            onChange={(event) => type({ until: event.currentTarget.value })}
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
        <ByDay {...range} />
        <Lines {...range} by={by.length === 0 ? ["day"] : by} />
      </Section>
      <AlertsSection />
    </>
  );
}

function lastDays(): DateRange {
  const now = Date.now();
  return { since: dayOf(now - (DAYS - 1) * DAY_MS), until: dayOf(now) };
}

function ByDay(range: DateRange) {
  const { data } = useUsage({ ...range, by: ["day"] });
  // What is not known is not nothing.
  if (data === undefined) return null;
  const tokens = new Map(data.lines.map((line) => [line.day ?? "", tokensOf(line)]));
  return <DayChart title="Tokens" unit="tokens" {...range} values={tokens} />;
}

function tokensOf(line: UsageLine): number {
  return line.prompt_tokens + line.completion_tokens;
}

function Lines(query: UsageQuery) {
  const { by } = query;
  const usage = useUsage(query);
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
