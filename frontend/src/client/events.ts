import { EventSourceParserStream } from "eventsource-parser/stream";
import { authorizedFetch } from "./auth";
import { PortalError } from "./errors";
import type { TurnEvent } from "./schema";

const ENDINGS: ReadonlySet<string> = new Set(["final", "cancelled", "superseded", "expired", "error"]);
const RETRY_MS = [250, 500, 1000, 2000, 4000, 8000];

/** Whether the event ends its turn. */
export function isEnding(event: TurnEvent): boolean {
  return ENDINGS.has(event.type);
}

/**
 * Asks for a stream of events. `body` makes it a POST.
 * Throws `PortalError` where the portal refuses, or does not answer.
 */
export async function openStream(path: string, body?: object, signal?: AbortSignal): Promise<Response> {
  const request = new Request(new URL(path, window.location.origin), {
    method: body === undefined ? "GET" : "POST",
    headers: { Accept: "text/event-stream", "Content-Type": "application/json" },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    ...(signal === undefined ? {} : { signal }),
  });
  const response = await authorizedFetch(request).catch((thrown: unknown) => {
    if (signal?.aborted) throw thrown;
    throw PortalError.from(thrown);
  });
  if (!response.ok) throw await PortalError.of(response);
  return response;
}

/**
 * The events of one connection, with their ids. It ends, or throws `TypeError`, when the connection does.
 */
export async function* readEvents(response: Response): AsyncGenerator<{ id: string; event: TurnEvent }> {
  if (response.body === null) return;
  const reader = response.body
    .pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array<ArrayBuffer>>)
    .pipeThrough(new EventSourceParserStream())
    .getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      yield { id: read.value.id ?? "", event: JSON.parse(read.value.data) as TurnEvent };
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/**
 * The events of a turn up to its ending, whatever happens to connections in between: after each that is
 * lost it goes on behind the last event seen. `first` is the connection that is there already, if any.
 * Throws `PortalError` when the portal stays away.
 */
export async function* followTurn(
  turnId: string | undefined,
  first: Response | undefined,
  signal?: AbortSignal,
): AsyncGenerator<TurnEvent> {
  let turn = turnId;
  let after = "";
  let failures = 0;
  for (let connection = first; ; connection = undefined) {
    try {
      const events = readEvents(connection ?? (await openStream(turnPath(turn, after), undefined, signal)));
      for await (const { id, event } of events) {
        failures = 0;
        turn = event.turn_id;
        after = id;
        yield event;
        if (isEnding(event)) return;
      }
    } catch (thrown) {
      if (signal?.aborted) return;
      const error = PortalError.from(thrown);
      if (!error.options.retryable) throw error;
      if (failures === RETRY_MS.length) throw error;
    }
    if (turn === undefined) throw new PortalError("unreachable", "The connection was lost.");
    await pause(RETRY_MS[failures] ?? 8000);
    failures += 1;
  }
}

function turnPath(turnId: string | undefined, after: string): string {
  const path = `/api/llm/turns/${encodeURIComponent(turnId ?? "")}/events`;
  return after ? `${path}?after=${after}` : path;
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
