import { describe, expect, it } from "vitest";
import { barsOf } from "./day-chart";

describe("barsOf", () => {
  it("fills the days on which nothing was used, also over the end of a month", () => {
    const values = new Map([["2026-03-01", 5]]);
    expect(barsOf({ since: "2026-02-27", until: "2026-03-02", values })).toEqual({
      each: 1,
      bars: [
        { label: "2026-02-27", value: 0 },
        { label: "2026-02-28", value: 0 },
        { label: "2026-03-01", value: 5 },
        { label: "2026-03-02", value: 0 },
      ],
    });
  });

  it("sums days where each of its own would be too thin to be seen", () => {
    const values = new Map([
      ["2025-12-31", 1000],
      ["2026-01-02", 1],
      ["2026-01-03", 2],
      ["2026-07-01", 4],
    ]);
    const { bars, each } = barsOf({ since: "2026-01-01", until: "2026-07-01", values });
    expect(each).toBe(3);
    expect(bars[0]).toEqual({ label: "2026-01-01 to 2026-01-03", value: 3 });
    expect(bars.at(-1)).toEqual({ label: "2026-06-30 to 2026-07-01", value: 4 });
  });

  it("has few bars, however long the time is", () => {
    expect(barsOf({ since: "0002-03-01", until: "2026-11-21", values: new Map() }).bars.length).toBeLessThan(
      91,
    );
  });
});
