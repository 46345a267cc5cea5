import { expect, it } from "vitest";
import { adviceFor, PortalError } from "./errors";

it.each([
  ["conflict", "This username or email already has an account."],
  ["rate_limited", "You may send at most 2 messages in an hour; try again in 3597 s."],
])("adds nothing to a %s, which says itself what to do", (code, message) => {
  expect(adviceFor(new PortalError(code, message))).toBeUndefined();
});

it("says what to do about a portal that cannot be reached", () => {
  expect(adviceFor(PortalError.from(new TypeError("Failed to fetch")))).toContain("network");
});
