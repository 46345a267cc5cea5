import { describe, expect, it } from "vitest";
import type { TurnEvent } from "../../client/schema";
import { advance, begin } from "./live-turn";

const USAGE = {
  prompt_tokens: 1,
  completion_tokens: 1,
  cached_tokens: 0,
  reasoning_tokens: 0,
  estimated: false,
};
const FINAL: TurnEvent = {
  type: "final",
  turn_id: "t",
  response: "Hello there",
  finish_reason: "stop",
  usage: USAGE,
  tool_calls: [],
  elapsed_ms: 2,
  ttft_ms: 1,
  message_id: "m",
};

function turnAfter(...events: TurnEvent[]) {
  return events.reduce(advance, begin("t", "s"));
}

describe("a turn as its events come", () => {
  it("grows by pieces, and ends with the whole reply", () => {
    const started = turnAfter(
      { type: "queued", turn_id: "t", position: 2, eta_s: 3 },
      { type: "thinking", turn_id: "t", content: "Hm" },
      { type: "token", turn_id: "t", content: "Hel" },
    );
    expect(started).toMatchObject({ state: "answering", thinking: "Hm", response: "Hel", position: 2 });
    expect(advance(started, FINAL)).toMatchObject({ state: "ended", response: "Hello there" });
  });

  it("forgets what came before a restart", () => {
    const turn = turnAfter(
      { type: "thinking", turn_id: "t", content: "Hm" },
      { type: "token", turn_id: "t", content: "void" },
      { type: "restarted", turn_id: "t", attempt: 2 },
      { type: "token", turn_id: "t", content: "Hel" },
    );
    expect(turn).toMatchObject({ thinking: "", response: "Hel" });
  });

  it("keeps what there was when it is stopped", () => {
    const turn = turnAfter({ type: "cancelled", turn_id: "t", response: "Hel", message_id: null });
    expect(turn).toMatchObject({ state: "ended", response: "Hel" });
  });

  it("has an error when it failed, and when it never ran", () => {
    const error = { code: "llm_timeout", message: "Too slow.", retryable: true };
    expect(turnAfter({ type: "error", turn_id: "t", error }).error).toMatchObject({ code: "llm_timeout" });
    expect(turnAfter({ type: "expired", turn_id: "t" }).error?.code).toBe("expired");
    expect(turnAfter({ type: "superseded", turn_id: "t", by: "r" }).error?.code).toBe("superseded");
  });
});
