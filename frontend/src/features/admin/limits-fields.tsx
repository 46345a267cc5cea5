import { NumberInput, SimpleGrid } from "@mantine/core";
import type { Limits } from "../../client/schema";

/** The limits that there are, in the words of the page. */
export const LIMITS = [
  { name: "requests_per_hour", label: "Messages an hour" },
  { name: "requests_per_session_minute", label: "Messages a minute in a session" },
  { name: "concurrent_turns", label: "Turns at once" },
  { name: "max_tokens", label: "Longest reply, tokens" },
  { name: "daily_tokens", label: "Tokens a day" },
  { name: "monthly_tokens", label: "Tokens a month" },
  { name: "daily_cost", label: "Cost a day" },
  { name: "monthly_cost", label: "Cost a month" },
  { name: "daily_gpu_seconds", label: "GPU seconds a day" },
  { name: "monthly_gpu_seconds", label: "GPU seconds a month" },
] as const satisfies readonly { name: keyof Limits; label: string }[];

/** A field for each limit; empty leaves it to the next wider rule. */
export function LimitsFields({ limits, onChange }: { limits: Limits; onChange: (limits: Limits) => void }) {
  return (
    <SimpleGrid cols={{ base: 1, xs: 2 }} spacing="sm">
      {LIMITS.map(({ name, label }) => (
        <NumberInput
          key={name}
          label={label}
          min={0}
          allowDecimal={/cost|seconds/.test(name)}
          value={limits[name] ?? ""}
          onChange={(value) => onChange({ ...limits, [name]: value === "" ? null : Number(value) })}
        />
      ))}
    </SimpleGrid>
  );
}

/** The limits that are set, as a sentence. */
export function limitsInWords(limits: Limits): string {
  const set = LIMITS.flatMap(({ name, label }) => {
    const value = limits[name];
    return value == null ? [] : [`${label}: ${value === 0 ? "none" : value.toLocaleString()}`];
  });
  return set.join(" · ") || "No limits of its own";
}
