import { llmAPI, type SessionChatOptions } from "../../api";
import { PortalError } from "../../client/errors";
import { isEnding } from "../../client/events";
import type { TurnEvent } from "../../client/schema";
import { advance, begin, breakOff, type LiveTurn } from "./live-turn";

/** How often at most a growing answer is drawn: more costs time that the next pieces need. */
const DRAW_EVERY_MS = 50;
/** How many times as long as drawing has taken the page is left alone then: a long answer takes long to draw. */
const REST = 4;

/** The turns that this page follows, as stores for `useSyncExternalStore`. */
export class LiveTurns {
  #turns = new Map<string, LiveTurn>();
  #watchers = new Map<string, Set<() => void>>();
  #following = new AbortController();
  #drawing: ReturnType<typeof setTimeout> | undefined;
  #drawEveryMs = DRAW_EVERY_MS;

  /** `onChange` is called with a session when one of its turns is accepted or has ended. */
  constructor(private readonly onChange: (sessionId: string) => void) {}

  /**
   * Calls `watcher` whenever the turn has changed, until the function that it returns is called. The turn is
   * followed from its beginning if it is not already.
   */
  watch(turnId: string, sessionId: string, watcher: () => void): () => void {
    const watchers = this.#watchers.get(turnId) ?? new Set();
    this.#watchers.set(turnId, watchers.add(watcher));
    this.#follow(turnId, sessionId);
    return () => {
      watchers.delete(watcher);
      // What is drawn in its place may watch it too.
      queueMicrotask(() => this.#forgetUnwatched(turnId));
    };
  }

  get = (turnId: string): LiveTurn | undefined => this.#turns.get(turnId);

  /** Sends a message; resolves once it is stored. Rejects with `PortalError` where nobody knows that it is. */
  async send(sessionId: string, message: string, options: SessionChatOptions): Promise<void> {
    const { signal } = this.#following;
    const events = llmAPI.sessionChatStream(sessionId, message, { ...options, signal });
    const first = await events.next();
    if (first.done) throw new PortalError("unreachable", "The connection was lost.", { retryable: true });
    const { turn_id: turnId } = first.value;
    if (this.#turns.has(turnId)) {
      // The page has heard of it before, and follows it.
      void events.return(undefined);
    } else {
      this.#turns.set(turnId, advance(begin(turnId, sessionId), first.value));
      void this.#consume(turnId, events);
    }
    this.onChange(sessionId);
  }

  /** Follows a lost turn once more. */
  again(turnId: string): void {
    const turn = this.#turns.get(turnId);
    if (turn?.state !== "lost") return;
    this.#turns.delete(turnId);
    this.#follow(turnId, turn.sessionId);
    this.#draw();
  }

  /** Follows all lost turns once more. */
  allAgain(): void {
    for (const turnId of [...this.#turns.keys()]) this.again(turnId);
  }

  /** Forgets all turns, whoever watches them. */
  clear(): void {
    this.#following.abort();
    this.#following = new AbortController();
    this.#turns.clear();
  }

  #follow(turnId: string, sessionId: string): void {
    if (this.#turns.has(turnId)) return;
    this.#turns.set(turnId, begin(turnId, sessionId));
    const { signal } = this.#following;
    void this.#consume(turnId, llmAPI.followTurn(turnId, { signal }));
  }

  async #consume(turnId: string, events: AsyncIterable<TurnEvent>): Promise<void> {
    try {
      for await (const event of events) {
        this.#update(turnId, (turn) => advance(turn, event));
        if (isEnding(event)) break;
      }
    } catch (thrown) {
      this.#update(turnId, (turn) => breakOff(turn, PortalError.from(thrown)));
    }
    this.#draw();
    const sessionId = this.get(turnId)?.sessionId;
    if (sessionId !== undefined) this.onChange(sessionId);
    this.#forgetUnwatched(turnId);
  }

  /** Its answer is stored at the portal, and long ones add up. */
  #forgetUnwatched(turnId: string): void {
    if (this.#watchers.get(turnId)?.size) return;
    this.#watchers.delete(turnId);
    const state = this.get(turnId)?.state;
    if (state === "ended" || state === "lost") this.#turns.delete(turnId);
  }

  #update(turnId: string, change: (turn: LiveTurn) => LiveTurn): void {
    const turn = this.#turns.get(turnId);
    if (turn === undefined) return;
    this.#turns.set(turnId, change(turn));
    this.#drawing ??= setTimeout(() => this.#draw(), this.#drawEveryMs);
  }

  #draw(): void {
    clearTimeout(this.#drawing);
    this.#drawing = undefined;
    const begun = performance.now();
    for (const watchers of this.#watchers.values()) {
      for (const watcher of watchers) watcher();
    }
    // By then React has drawn, in a microtask of its own.
    queueMicrotask(() => {
      this.#drawEveryMs = Math.max(DRAW_EVERY_MS, REST * (performance.now() - begun));
    });
  }
}
