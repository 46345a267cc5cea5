/**
 * The chat API of the portal, for this page and for pages that people write themselves.
 *
 * Plain calls resolve to `{data, status}` and reject with `PortalError`; streams are async iterators of
 * the events of `docs/protocol.md`.
 */

import { followTurn, isEnding, openStream, readEvents } from "./client/events";
import { http, result } from "./client/http";
import type { Chat, SessionChat, TurnEvent } from "./client/schema";

/** Options of a call without a session. */
export type ChatOptions = Omit<Chat, "messages"> & { signal?: AbortSignal };

/** Options of a message in a session. */
export type SessionChatOptions = Omit<SessionChat, "session_id" | "message"> & { signal?: AbortSignal };

/** A message in OpenAI's form. */
export type ChatMessage = Chat["messages"][number];

/** A new id for a request or a session. */
export function newId(): string {
  // `crypto.randomUUID` is missing where the page did not come over HTTPS or from this machine.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function withoutSignal<T extends { signal?: AbortSignal }>(options: T): [Omit<T, "signal">, AbortSignal?] {
  const { signal, ...rest } = options;
  return signal === undefined ? [rest] : [rest, signal];
}

async function* chatStream(messages: ChatMessage[], options: ChatOptions = {}): AsyncGenerator<TurnEvent> {
  const [rest, signal] = withoutSignal(options);
  const response = await openStream("/api/llm/chat/stream", { messages, ...rest }, signal);
  for await (const { event } of readEvents(response)) {
    yield event;
    if (isEnding(event)) return;
  }
}

async function* sessionChatStream(
  sessionId: string,
  message: string,
  options: SessionChatOptions = {},
): AsyncGenerator<TurnEvent> {
  const [rest, signal] = withoutSignal(options);
  // With an id of the client's the turn goes on when this page is left, and can be come back to.
  const asked = { session_id: sessionId, message, request_id: newId(), ...rest };
  const response = await openStream("/api/llm/chat/session/stream", asked, signal);
  yield* followTurn(undefined, response, signal);
}

export const llmAPI = {
  /** Answers messages; nothing of it is kept. */
  chat: (messages: ChatMessage[], options: ChatOptions = {}) => {
    const [rest, signal] = withoutSignal(options);
    return result(http.POST("/api/llm/chat", { body: { messages, ...rest }, signal: signal ?? null }));
  },

  /** `chat` as a stream of events. */
  chatStream,

  /** Sends a message in a session, which is made if it is new. */
  sessionChat: (sessionId: string, message: string, options: SessionChatOptions = {}) => {
    const [rest, signal] = withoutSignal(options);
    const body = { session_id: sessionId, message, request_id: newId(), ...rest };
    return result(http.POST("/api/llm/chat/session", { body, signal: signal ?? null }));
  },

  /** `sessionChat` as a stream of events. It survives lost connections. */
  sessionChatStream,

  /** The events of a turn, running or ended, from its beginning. */
  followTurn: (turnId: string, options: { signal?: AbortSignal } = {}) =>
    followTurn(turnId, undefined, options.signal),

  /** The messages of a session, oldest first. */
  getSessionHistory: (sessionId: string, query: { limit?: number; before?: string } = {}) =>
    result(
      http.GET("/api/llm/chat/session/{session_id}/history", {
        params: { path: { session_id: sessionId }, query },
      }),
    ),

  /** Deletes the messages of a session. */
  clearSession: (sessionId: string) =>
    result(
      http.DELETE("/api/llm/chat/session/{session_id}", { params: { path: { session_id: sessionId } } }),
    ),

  /** Stops the running turn of a session. */
  stopSession: (sessionId: string) =>
    result(
      http.POST("/api/llm/chat/session/{session_id}/stop", { params: { path: { session_id: sessionId } } }),
    ),

  /** How the LLM server is. */
  health: () => result(http.GET("/api/llm/health")),
};
