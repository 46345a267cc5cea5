import { expect, it } from "vitest";
import { ago } from "./ago";

it.each([
  [-5, "just now"],
  [59, "just now"],
  [61, "1 minute ago"],
  [3 * 3600, "3 hours ago"],
  [30 * 3600, "yesterday"],
  [400 * 86400, "last year"],
])("%d seconds are told in words", (seconds, words) => {
  expect(ago(seconds)).toBe(words);
});
