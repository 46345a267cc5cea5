import { beforeEach, describe, expect, it, vi } from "vitest";
import { llmAPI } from "../../api";
import { PortalError } from "../../client/errors";
import type { TurnEvent } from "../../client/schema";
import { LiveTurns } from "./live-turns";

vi.mock("../../api", () => ({ llmAPI: { sessionChatStream: vi.fn(), followTurn: vi.fn() } }));

const ACCEPTED: TurnEvent = {
  type: "accepted",
  turn_id: "t",
  session_id: "s",
  request_id: "r",
  message_id: "m",
};
const STOPPED: TurnEvent = { type: "cancelled", turn_id: "t", response: "Hello", message_id: null };
const token = (content: string): TurnEvent => ({ type: "token", turn_id: "t", content });

/** The events of one connection, as the test lets them come. */
class Connection {
  #events: (TurnEvent | Error | "end")[] = [];
  #wake = () => {};
  wasLeft = false;

  tell(...events: (TurnEvent | Error | "end")[]): void {
    this.#events.push(...events);
    this.#wake();
  }

  async *events(): AsyncGenerator<TurnEvent> {
    try {
      for (;;) {
        const event = this.#events.shift();
        if (event instanceof Error) throw event;
        if (event === "end") return;
        if (event === undefined) {
          await new Promise<void>((resolve) => {
            this.#wake = resolve;
          });
        } else {
          yield event;
        }
      }
    } finally {
      this.wasLeft = true;
    }
  }
}

const onChange = vi.fn();
let turns: LiveTurns;

beforeEach(() => {
  vi.resetAllMocks();
  turns = new LiveTurns(onChange);
});

function followed(): Connection {
  const connection = new Connection();
  vi.mocked(llmAPI.followTurn).mockReturnValueOnce(connection.events());
  return connection;
}

function sent(): Connection {
  const connection = new Connection();
  vi.mocked(llmAPI.sessionChatStream).mockReturnValueOnce(connection.events());
  return connection;
}

const UNREACHABLE = new PortalError("unreachable", "The portal cannot be reached.", { retryable: true });

describe("the turns that a page follows", () => {
  it("have each piece once, though the page hears of one before its own message is accepted", async () => {
    const sending = sent();
    const following = followed();
    const accepted = turns.send("s", "Hi", {});
    turns.watch("t", "s", vi.fn());
    sending.tell(ACCEPTED, token("Hel"));
    await accepted;
    following.tell(ACCEPTED, token("Hel"));
    await vi.waitFor(() => expect(turns.get("t")?.response).toBe("Hel"));
    await vi.waitFor(() => expect(sending.wasLeft).toBe(true));
  });

  it("are lost when the portal stays away, and followed from the beginning once it is back", async () => {
    const first = followed();
    turns.watch("t", "s", vi.fn());
    first.tell(token("Hel"), UNREACHABLE);
    await vi.waitFor(() => expect(turns.get("t")).toMatchObject({ state: "lost", error: UNREACHABLE }));
    const second = followed();
    turns.allAgain();
    expect(turns.get("t")).toMatchObject({ state: "waiting", response: "" });
    second.tell(token("Hel"), token("lo"), STOPPED);
    await vi.waitFor(() => expect(turns.get("t")).toMatchObject({ state: "ended", response: "Hello" }));
    expect(turns.get("t")?.error).toBeUndefined();
    turns.allAgain();
    expect(llmAPI.followTurn).toHaveBeenCalledTimes(2);
  });

  it("have ended when the portal does not know them any more", async () => {
    followed().tell(new PortalError("not_found", "There is no such turn."));
    turns.watch("t", "s", vi.fn());
    await vi.waitFor(() => expect(turns.get("t")?.state).toBe("ended"));
  });

  it("are kept while somebody looks, and while they run", async () => {
    const connection = followed();
    const look = () => turns.watch("t", "s", vi.fn());
    let lookAway = look();
    lookAway();
    await Promise.resolve();
    expect(turns.get("t")).toBeDefined();
    lookAway = look();
    connection.tell(STOPPED);
    await vi.waitFor(() => expect(turns.get("t")?.state).toBe("ended"));
    lookAway();
    lookAway = look();
    await Promise.resolve();
    expect(turns.get("t")?.state).toBe("ended");
    lookAway();
    await Promise.resolve();
    expect(turns.get("t")).toBeUndefined();
    expect(llmAPI.followTurn).toHaveBeenCalledTimes(1);
  });

  it("are forgotten where nobody looks when they end, and when somebody signs out", async () => {
    const sending = sent();
    sending.tell(ACCEPTED, STOPPED);
    await turns.send("s", "Hi", {});
    await vi.waitFor(() => expect(turns.get("t")).toBeUndefined());
    expect(onChange).toHaveBeenCalledTimes(2);

    followed();
    turns.watch("t", "s", vi.fn());
    const { signal } = vi.mocked(llmAPI.followTurn).mock.lastCall?.[1] ?? {};
    turns.clear();
    expect(turns.get("t")).toBeUndefined();
    expect(signal?.aborted).toBe(true);
  });

  it("are drawn less often where that takes long", async () => {
    vi.useFakeTimers();
    const connection = followed();
    let drawn = 0;
    let clock = 0;
    vi.spyOn(performance, "now").mockImplementation(() => clock);
    turns.watch("t", "s", () => {
      drawn += 1;
      clock += 300;
    });
    for (let piece = 0; piece < 60; piece += 1) {
      connection.tell(token("piece "));
      await vi.advanceTimersByTimeAsync(50);
    }
    expect(drawn).toBeGreaterThan(1);
    expect(drawn).toBeLessThan(5);
    vi.useRealTimers();
  });
});
