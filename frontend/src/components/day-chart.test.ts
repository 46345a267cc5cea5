import { describe, expect, it } from "vitest";
import { everyDay } from "./day-chart";

describe("everyDay", () => {
  it("fills the days on which nothing was used, also over the end of a month", () => {
    const values = new Map([["2026-03-01", 5]]);
    expect(everyDay("2026-02-27", "2026-03-02", values)).toEqual([
      { day: "2026-02-27", value: 0 },
      { day: "2026-02-28", value: 0 },
      { day: "2026-03-01", value: 5 },
      { day: "2026-03-02", value: 0 },
    ]);
  });
});
