import { PortalError } from "../../client/errors";
import type { TurnEvent } from "../../client/schema";

/**
 * A turn as this page has seen it so far. `state` is `lost` when it may go on but cannot be followed for now, and
 * `ended` also when it cannot be followed any more.
 */
export interface LiveTurn {
  turnId: string;
  sessionId: string;
  state: "waiting" | "queued" | "thinking" | "answering" | "lost" | "ended";
  position: number;
  etaS: number;
  thinking: string;
  response: string;
  error?: PortalError;
}

/** The turn after one more event. */
export function advance(turn: LiveTurn, event: TurnEvent): LiveTurn {
  switch (event.type) {
    case "accepted":
      return turn;
    case "queued":
      return { ...turn, state: "queued", position: event.position, etaS: event.eta_s };
    case "restarted":
      return { ...turn, state: "waiting", thinking: "", response: "" };
    case "thinking":
      return { ...turn, state: "thinking", thinking: turn.thinking + event.content };
    case "token":
      return { ...turn, state: "answering", response: turn.response + event.content };
    case "final":
    case "cancelled":
      return { ...turn, state: "ended", response: event.response };
    case "error":
      return { ...turn, state: "ended", error: PortalError.ofTurn(event.error) };
    case "expired":
      return { ...turn, state: "ended", error: new PortalError("expired", "It waited for too long.") };
    case "superseded":
      return {
        ...turn,
        state: "ended",
        error: new PortalError("superseded", "A newer message took its place."),
      };
  }
}

/** The turn after following it has failed. */
export function breakOff(turn: LiveTurn, error: PortalError): LiveTurn {
  return { ...turn, state: error.options.retryable ? "lost" : "ended", error };
}

/** A turn of which nothing has come yet. */
export function begin(turnId: string, sessionId: string): LiveTurn {
  return { turnId, sessionId, state: "waiting", position: 0, etaS: 0, thinking: "", response: "" };
}
