import { type QueryClient, useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { useEffect } from "react";
import { llmAPI } from "../api";
import { body, http } from "../client/http";
import { followSessions } from "../client/session-news";
import { gathered } from "./gathered";

export const sessionKeys = {
  all: ["sessions"] as const,
  list: (search: string) => ["sessions", "list", search] as const,
  one: (id: string) => ["sessions", "one", id] as const,
  histories: ["history"] as const,
  history: (id: string) => ["history", id] as const,
};

const LIST_LIMIT = 100;
/** How often at most something is loaded again that changes at the portal, as devices make it. */
const NEWS_EVERY_MS = 1_000;

export function useSessions(search: string) {
  return useQuery({
    queryKey: sessionKeys.list(search),
    queryFn: () => body(http.GET("/api/sessions", { params: { query: { search, limit: LIST_LIMIT } } })),
    placeholderData: (before) => before,
  });
}

/** Keeps the list of sessions, and what is shown of one, as it is at the portal, whoever changes it. */
export function useSessionNews() {
  const queries = useQueryClient();
  useEffect(() => {
    const refreshAll = () => queries.invalidateQueries({ queryKey: sessionKeys.all });
    const refresh = gathered(NEWS_EVERY_MS, refreshAll);
    const refreshHistories = gathered(NEWS_EVERY_MS, (ids: ReadonlySet<string>) =>
      Promise.all([...ids].map((id) => refreshHistory(queries, id))),
    );
    return followSessions((news) => {
      switch (news.type) {
        case "connection_established":
          void refreshAll();
          void queries.invalidateQueries({ queryKey: sessionKeys.histories });
          break;
        case "turn_started":
        case "turn_ended":
          refreshHistories(news.session_id);
          break;
        default:
          refresh(news.session.session_id);
      }
    });
  }, [queries]);
}

/** Loads the messages of a session again where they are shown. */
export async function refreshHistory(queries: QueryClient, id: string): Promise<void> {
  const queryKey = sessionKeys.history(id);
  // A first load that is on its way tells of the time before, and would not be begun again otherwise.
  await queries.cancelQueries({ queryKey });
  await queries.invalidateQueries({ queryKey });
}

export function useSession(id: string) {
  return useQuery({
    queryKey: sessionKeys.one(id),
    queryFn: () => body(http.GET("/api/sessions/{session_id}", { params: { path: { session_id: id } } })),
  });
}

/** The newest messages of a session, so many at most. */
export function useHistory(id: string, limit: number) {
  return useQuery({
    queryKey: [...sessionKeys.history(id), limit],
    queryFn: async () => (await llmAPI.getSessionHistory(id, { limit })).data,
    placeholderData: (before) => before,
  });
}

function useSessionMutation<T, R>(mutationFn: (variables: T) => Promise<R>) {
  const queries = useQueryClient();
  return useMutation({
    mutationFn,
    onSuccess: () => queries.invalidateQueries({ queryKey: sessionKeys.all }),
  });
}

export function useRenameSession() {
  return useSessionMutation(({ id, title }: { id: string; title: string }) =>
    body(http.PATCH("/api/sessions/{session_id}", { params: { path: { session_id: id } }, body: { title } })),
  );
}

export function useDeleteSession() {
  return useSessionMutation((id: string) =>
    body(http.DELETE("/api/sessions/{session_id}", { params: { path: { session_id: id } } })),
  );
}

export function useRestoreSession() {
  return useSessionMutation((id: string) =>
    body(http.POST("/api/sessions/{session_id}/restore", { params: { path: { session_id: id } } })),
  );
}

export function useClearSession() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: llmAPI.clearSession,
    onSuccess: (_, id) => queries.invalidateQueries({ queryKey: sessionKeys.history(id) }),
  });
}
