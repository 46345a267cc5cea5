import { Text, VisuallyHidden } from "@mantine/core";
import classes from "./day-chart.module.css";

export interface Day {
  day: string;
  value: number;
}

const DAY_MS = 86_400_000;

/** Every day from the first to the last (both `2026-11-21`), with what there is of it. */
export function everyDay(since: string, until: string, values: ReadonlyMap<string, number>): Day[] {
  const days: Day[] = [];
  for (let at = Date.parse(since); at <= Date.parse(until); at += DAY_MS) {
    const day = new Date(at).toISOString().slice(0, 10);
    days.push({ day, value: values.get(day) ?? 0 });
  }
  return days;
}

/** Bars of what was used by day. Whoever does not see them has a table. */
export function DayChart({ title, unit, days }: { title: string; unit: string; days: Day[] }) {
  const most = Math.max(...days.map((day) => day.value));
  return (
    <figure className={classes["figure"]}>
      <div className={classes["bars"]} aria-hidden>
        {days.map(({ day, value }) => (
          <div key={day} className={classes["slot"]} title={`${day}: ${value.toLocaleString()} ${unit}`}>
            <div className={classes["bar"]} style={{ height: `${(100 * value) / (most || 1)}%` }} />
          </div>
        ))}
      </div>
      <Text component="figcaption" size="xs" c="dimmed">
        {title}, {days[0]?.day} to {days.at(-1)?.day};{" "}
        {most === 0 ? "there were none" : `the highest bar is ${most.toLocaleString()} ${unit}`}
      </Text>
      <VisuallyHidden>
        <table>
          <caption>{title}</caption>
          <tbody>
            {days.map(({ day, value }) => (
              <tr key={day}>
                <th scope="row">{day}</th>
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
