const STEPS: [Intl.RelativeTimeFormatUnit, number][] = [
  ["second", 60],
  ["minute", 60],
  ["hour", 24],
  ["day", 30],
  ["month", 12],
  ["year", Number.POSITIVE_INFINITY],
];
const words = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

/** How long ago an ISO 8601 time was; the time itself on hovering. */
export function Ago({ time, prefix = "" }: { time: string; prefix?: string }) {
  const date = new Date(time);
  return (
    <time dateTime={time} title={date.toLocaleString()}>
      {prefix}
      {ago((Date.now() - date.getTime()) / 1000)}
    </time>
  );
}

/** So many seconds ago, in words. */
export function ago(seconds: number): string {
  let amount = Math.max(0, seconds);
  for (const [unit, next] of STEPS) {
    if (amount < next) return unit === "second" ? "just now" : words.format(-Math.floor(amount), unit);
    amount /= next;
  }
  return "";
}
