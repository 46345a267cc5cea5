import { expect, it } from "vitest";
import { deviceOf } from "./device";

const MOZILLA = "Mozilla/5.0";

it.each([
  [`${MOZILLA} (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 Safari/537.36`, "Chrome on Linux"],
  [`${MOZILLA} (Windows NT 10.0) AppleWebKit/537.36 Chrome/156.0 Safari/537.36 Edg/156.0`, "Edge on Windows"],
  [`${MOZILLA} (iPhone; CPU iPhone OS 19_0 like Mac OS X) AppleWebKit/605 Safari/604.1`, "Safari on iOS"],
  [`${MOZILLA} (Macintosh; Intel Mac OS X 10.15; rv:140.0) Gecko/20100101 Firefox/140.0`, "Firefox on macOS"],
  ["curl/8.9.1", "curl/8.9.1"],
  ["", "A program"],
])("%s", (userAgent, words) => {
  expect(deviceOf(userAgent)).toBe(words);
});
