/** Days, both like `2026-11-21`. */
export interface DateRange {
  since: string;
  until: string;
}

export const FIRST_DAY = "2000-01-01";
export const LAST_DAY = "2999-12-31";
const DAY = /^2\d{3}-\d\d-\d\d$/;

/** Whether these are days in order. A year that is being typed is at first one of long ago. */
export function isRange({ since, until }: DateRange): boolean {
  return DAY.test(since) && DAY.test(until) && since <= until;
}
