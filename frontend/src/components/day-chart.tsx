import { Text, VisuallyHidden } from "@mantine/core";
import classes from "./day-chart.module.css";
import { DAY_MS, dayOf } from "./days";

/** More are too thin to be seen on a phone. */
const MOST_BARS = 90;

interface Props {
  /** What is shown, in front of "a day". */
  title: string;
  unit: string;
  /** The first and the last day, both like `2026-11-21`. */
  since: string;
  until: string;
  /** What there is of each day, where there is something. */
  values: ReadonlyMap<string, number>;
}

interface Bar {
  label: string;
  value: number;
}

/** A bar for each day or, where these would be too many, for as many days as it takes. */
export function barsOf({ since, until, values }: Pick<Props, "since" | "until" | "values">) {
  const first = Date.parse(since);
  const last = Date.parse(until);
  const days = Math.round((last - first) / DAY_MS) + 1;
  const each = Math.ceil(days / MOST_BARS);
  const bars: Bar[] = [];
  for (let from = first; from <= last; from += each * DAY_MS) {
    const to = Math.min(from + (each - 1) * DAY_MS, last);
    bars.push({ label: from === to ? dayOf(from) : `${dayOf(from)} to ${dayOf(to)}`, value: 0 });
  }
  for (const [day, value] of values) {
    const bar = bars[Math.floor((Date.parse(day) - first) / DAY_MS / each)];
    if (bar !== undefined) bar.value += value;
  }
  return { bars, each };
}

/** Bars of what was used by day. Whoever does not see them has a table. */
export function DayChart({ title: what, unit, since, until, values }: Props) {
  const { bars, each } = barsOf({ since, until, values });
  const most = Math.max(...bars.map((bar) => bar.value));
  const title = each === 1 ? `${what} a day` : `${what} in ${each} days`;
  return (
    <figure className={classes["figure"]}>
      <div className={classes["bars"]} aria-hidden>
        {bars.map(({ label, value }) => (
          <div key={label} className={classes["slot"]} title={`${label}: ${value.toLocaleString()} ${unit}`}>
            <div className={classes["bar"]} style={{ height: `${(100 * value) / (most || 1)}%` }} />
          </div>
        ))}
      </div>
      <Text component="figcaption" size="xs" c="dimmed">
        {title}, {since} to {until};{" "}
        {most === 0 ? "there were none" : `the highest bar is ${most.toLocaleString()} ${unit}`}
      </Text>
      <VisuallyHidden>
        <table>
          <caption>{title}</caption>
          <tbody>
            {bars.map(({ label, value }) => (
              <tr key={label}>
                <th scope="row">{label}</th>
                <td>
                  {value} {unit}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </VisuallyHidden>
    </figure>
  );
}
