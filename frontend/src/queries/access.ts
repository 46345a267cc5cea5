import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { body, http } from "../client/http";
import type { NewKey } from "../client/schema";

const KEYS = ["keys"] as const;

/** What I may, and how much. */
export function usePermissions() {
  return useQuery({
    queryKey: ["permissions"],
    queryFn: () => body(http.GET("/api/auth/permissions")),
    staleTime: 60_000,
  });
}

/** Tells whether I have a permission; nothing is allowed until that is known. */
export function useMay(): (permission: string) => boolean {
  const { data } = usePermissions();
  const allowed = new Set(data?.permissions.filter((one) => one.allowed).map((one) => one.name));
  return (permission) => allowed.has(permission);
}

export function useStats(days: number) {
  return useQuery({
    queryKey: ["stats", days],
    queryFn: () => body(http.GET("/api/stats", { params: { query: { days } } })),
  });
}

export function useKeys() {
  return useQuery({ queryKey: KEYS, queryFn: async () => (await body(http.GET("/api/keys"))).keys });
}

export function useMakeKey() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: (key: NewKey) => body(http.POST("/api/keys", { body: key })),
    onSuccess: () => queries.invalidateQueries({ queryKey: KEYS }),
  });
}

export function useRevokeKey() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: (id: string) => body(http.DELETE("/api/keys/{key_id}", { params: { path: { key_id: id } } })),
    onSuccess: () => queries.invalidateQueries({ queryKey: KEYS }),
  });
}
