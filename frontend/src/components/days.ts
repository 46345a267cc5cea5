export const DAY_MS = 86_400_000;

/** The day of a time, as at the portal: in UTC, like `2026-11-21`. */
export function dayOf(at: number): string {
  return new Date(at).toISOString().slice(0, 10);
}
