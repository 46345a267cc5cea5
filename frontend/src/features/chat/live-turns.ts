import { llmAPI, type SessionChatOptions } from "../../api";
import { PortalError } from "../../client/errors";
import { isEnding } from "../../client/events";
import type { TurnEvent } from "../../client/schema";
import { advance, begin, type LiveTurn } from "./live-turn";

/** How often at most a growing answer is drawn: more costs time that the next pieces need. */
const DRAW_EVERY_MS = 50;

/** The turns that this page follows, as a store for `useSyncExternalStore`. */
export class LiveTurns {
  #turns = new Map<string, LiveTurn>();
  #listeners = new Set<() => void>();
  #drawing: ReturnType<typeof setTimeout> | undefined;

  /** `onChange` is called with a session when one of its turns is accepted or has ended. */
  constructor(private readonly onChange: (sessionId: string) => void) {}

  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  get = (turnId: string): LiveTurn | undefined => this.#turns.get(turnId);

  /** Sends a message; resolves once it is stored. Rejects with `PortalError`, and then nothing was sent. */
  async send(sessionId: string, message: string, options: SessionChatOptions): Promise<void> {
    const events = llmAPI.sessionChatStream(sessionId, message, options);
    const first = await events.next();
    if (first.done) throw new PortalError("unreachable", "The connection was lost.", { retryable: true });
    const turn = begin(first.value.turn_id, sessionId);
    this.#turns.set(turn.turnId, turn);
    this.onChange(sessionId);
    void this.#consume(turn.turnId, events);
  }

  /** Follows a turn that was begun elsewhere, or before the page was loaded. */
  follow(turnId: string, sessionId: string): void {
    if (this.#turns.has(turnId)) return;
    this.#turns.set(turnId, begin(turnId, sessionId));
    void this.#consume(turnId, llmAPI.followTurn(turnId));
  }

  /** Follows an ended turn once more, where that failed before. */
  again(turnId: string, sessionId: string): void {
    this.#turns.delete(turnId);
    this.follow(turnId, sessionId);
  }

  async #consume(turnId: string, events: AsyncIterable<TurnEvent>): Promise<void> {
    try {
      for await (const event of events) {
        this.#update(turnId, (turn) => advance(turn, event));
        if (isEnding(event)) break;
      }
    } catch (thrown) {
      this.#update(turnId, (turn) => ({ ...turn, state: "ended", error: PortalError.from(thrown) }));
    }
    this.#draw();
    const sessionId = this.get(turnId)?.sessionId;
    if (sessionId !== undefined) this.onChange(sessionId);
  }

  #update(turnId: string, change: (turn: LiveTurn) => LiveTurn): void {
    const turn = this.#turns.get(turnId);
    if (turn === undefined) return;
    this.#turns.set(turnId, change(turn));
    this.#drawing ??= setTimeout(() => this.#draw(), DRAW_EVERY_MS);
  }

  #draw(): void {
    clearTimeout(this.#drawing);
    this.#drawing = undefined;
    for (const listener of this.#listeners) listener();
  }
}
