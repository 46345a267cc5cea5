import { Group, Progress, Stack, Text } from "@mantine/core";
import type { BudgetBody, Stats, Used } from "../../client/schema";
import { DayChart } from "../../components/day-chart";
import { DAY_MS, dayOf } from "../../components/days";
import { Loaded } from "../../components/loaded";
import { Section } from "../../components/section";
import { useStats } from "../../queries/access";

const DAYS = 30;
const NEARLY = 0.8;

const UNITS: Record<string, string> = { tokens: "tokens", cost: "of the cost", gpu_seconds: "GPU seconds" };

export function UsageCard() {
  const stats = useStats(DAYS);
  return (
    <Section title="Usage">
      <Loaded query={stats} label="what you have used">
        {(data) => (
          <Stack gap="sm">
            <Group gap="xl">
              <Sum title="Today" used={data.today} />
              <Sum title="This month" used={data.month} />
            </Group>
            {data.budgets.map((budget) => (
              <Budget key={budget.budget} {...budget} />
            ))}
            <TokensByDay {...data} />
          </Stack>
        )}
      </Loaded>
    </Section>
  );
}

function TokensByDay({ days }: Stats) {
  const tokens = new Map<string, number>();
  for (const line of days) {
    tokens.set(line.day, (tokens.get(line.day) ?? 0) + line.prompt_tokens + line.completion_tokens);
  }
  const now = Date.now();
  const since = dayOf(now - (DAYS - 1) * DAY_MS);
  return <DayChart title="Tokens" unit="tokens" since={since} until={dayOf(now)} values={tokens} />;
}

function Sum({ title, used }: { title: string; used: Used }) {
  const tokens = used.prompt_tokens + used.completion_tokens;
  return (
    <div>
      <Text size="sm" c="dimmed">
        {title}
      </Text>
      <Text>
        {tokens.toLocaleString()} tokens in {used.turns.toLocaleString()} messages
      </Text>
      <Text size="sm" c="dimmed">
        {used.gpu_seconds.toFixed(1)} GPU seconds{used.cost > 0 && `, cost ${used.cost.toFixed(4)}`}
      </Text>
    </div>
  );
}

function Budget({ budget, spent, amount }: BudgetBody) {
  const [period, ...what] = budget.split("_");
  const part = spent / amount;
  const label = `${period === "daily" ? "Today" : "This month"}: ${round(spent)} of ${round(amount)} ${UNITS[what.join("_")]}`;
  return (
    <div>
      <Text size="sm">{label}</Text>
      <Progress
        value={Math.min(100, 100 * part)}
        color={part >= 1 ? "red" : part >= NEARLY ? "yellow" : "portal"}
        aria-label={label}
      />
    </div>
  );
}

function round(amount: number): string {
  return amount.toLocaleString(undefined, { maximumFractionDigits: 4 });
}
