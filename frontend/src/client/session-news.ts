import { body, http } from "./http";
import type { Session } from "./schema";

/** What happens in the list of the person's sessions. */
export type SessionNews =
  | { type: "connection_established" }
  | { type: "session_created" | "session_updated"; session: Session }
  | { type: "session_deleted"; session: { session_id: string } }
  | { type: "turn_started" | "turn_ended"; session_id: string; turn_id: string };

const AGAIN_FIRST_MS = 1_000;
const AGAIN_MOST_MS = 30_000;

/** Calls `onNews` with all that happens, until the function that it returns is called. Whenever it has connected,
 * also again, it says so first: what happened before is not told. */
export function followSessions(onNews: (news: SessionNews) => void): () => void {
  let socket: WebSocket | undefined;
  let timer: number | undefined;
  let pause = AGAIN_FIRST_MS;
  let isOver = false;

  async function connect(): Promise<void> {
    try {
      const { ticket } = await body(http.POST("/api/auth/ws-ticket"));
      if (isOver) return;
      const address = new URL(`/ws/sessions?ticket=${encodeURIComponent(ticket)}`, window.location.href);
      address.protocol = address.protocol.replace("http", "ws");
      socket = new WebSocket(address);
    } catch {
      again();
      return;
    }
    socket.onmessage = ({ data }: MessageEvent<string>) => {
      pause = AGAIN_FIRST_MS;
      onNews(JSON.parse(data) as SessionNews);
    };
    socket.onclose = again;
  }

  function again(): void {
    if (isOver) return;
    timer = window.setTimeout(() => void connect(), pause * (0.5 + Math.random() / 2));
    pause = Math.min(pause * 2, AGAIN_MOST_MS);
  }

  void connect();
  return () => {
    isOver = true;
    window.clearTimeout(timer);
    socket?.close();
  };
}
