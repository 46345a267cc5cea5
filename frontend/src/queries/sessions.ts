import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { useEffect } from "react";
import { llmAPI } from "../api";
import { body, http } from "../client/http";
import { followSessions } from "../client/session-news";

export const sessionKeys = {
  all: ["sessions"] as const,
  list: (search: string) => ["sessions", "list", search] as const,
  one: (id: string) => ["sessions", "one", id] as const,
  history: (id: string) => ["history", id] as const,
};

const LIST_LIMIT = 100;

export function useSessions(search: string) {
  return useQuery({
    queryKey: sessionKeys.list(search),
    queryFn: () => body(http.GET("/api/sessions", { params: { query: { search, limit: LIST_LIMIT } } })),
    placeholderData: (before) => before,
  });
}

/** Keeps the list of sessions as it is at the portal, whoever changes it, for as long as it is shown. */
export function useSessionNews() {
  const queries = useQueryClient();
  useEffect(
    () =>
      followSessions((news) => {
        if (!news.type.startsWith("turn_")) void queries.invalidateQueries({ queryKey: sessionKeys.all });
      }),
    [queries],
  );
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
