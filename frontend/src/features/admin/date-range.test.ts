import { expect, it } from "vitest";
import { isRange } from "./date-range";

it.each([
  ["2026-01-03", "2026-01-03", true],
  ["2025-11-21", "2026-01-03", true],
  ["0202-01-03", "2026-01-03", false],
  ["", "2026-01-03", false],
  ["2026-01-03", "", false],
  ["2026-01-04", "2026-01-03", false],
  ["2026-01-03", "20266-01-03", false],
])("from %s to %s", (since, until, expected) => {
  expect(isRange({ since, until })).toBe(expected);
});
