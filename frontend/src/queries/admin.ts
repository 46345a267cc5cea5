import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { authorizedFetch } from "../client/auth";
import { PortalError } from "../client/errors";
import { body, http } from "../client/http";
import type { Limits, NewInvitation, Role, UsageReport, UserChange } from "../client/schema";

const ADMIN = ["admin"] as const;
const LIST_LIMIT = 200;
const LASTING_MS = 60_000;

export type Group = "day" | "owner" | "api_key" | "project" | "model" | "door";

export interface UsageQuery {
  since: string;
  until: string;
  by: Group[];
}

export interface AuditQuery {
  actor?: string;
  action?: string;
  outcome?: string;
}

export function useUsers(search: string, enabled = true) {
  return useQuery({
    queryKey: [...ADMIN, "users", search],
    queryFn: () => body(http.GET("/api/admin/users", { params: { query: { search, limit: LIST_LIMIT } } })),
    placeholderData: (before) => before,
    staleTime: LASTING_MS, // each look at it is noted in the audit log
    enabled,
  });
}

export function useUserKeys(user: string) {
  return useQuery({
    queryKey: [...ADMIN, "keys", user],
    queryFn: async () =>
      (await body(http.GET("/api/admin/users/{user_id}/keys", { params: { path: { user_id: user } } }))).keys,
  });
}

export function useInvitations() {
  return useQuery({
    queryKey: [...ADMIN, "invitations"],
    queryFn: async () => (await body(http.GET("/api/admin/invitations"))).invitations,
  });
}

export function useRoles() {
  return useQuery({
    queryKey: [...ADMIN, "roles"],
    queryFn: async () => (await body(http.GET("/api/admin/roles"))).roles,
  });
}

export function useLimits() {
  return useQuery({
    queryKey: [...ADMIN, "limits"],
    queryFn: async () => (await body(http.GET("/api/admin/limits"))).limits,
  });
}

export function useUsage(query: UsageQuery) {
  return useQuery({
    queryKey: [...ADMIN, "usage", query],
    // The route gives CSV too, but only to who asks for it.
    queryFn: async () => (await body(http.GET("/api/admin/usage", { params: { query } }))) as UsageReport,
    placeholderData: (before) => before,
  });
}

export function useAlerts() {
  return useQuery({
    queryKey: [...ADMIN, "alerts"],
    queryFn: async () => (await body(http.GET("/api/admin/alerts"))).alerts,
  });
}

export function useAudit(query: AuditQuery, before: number | undefined) {
  return useQuery({
    queryKey: [...ADMIN, "audit", query, before],
    queryFn: () =>
      body(http.GET("/api/admin/audit", { params: { query: { ...query, ...(before ? { before } : {}) } } })),
    placeholderData: (earlier) => earlier,
  });
}

export function useVerifyAudit() {
  return useMutation({ mutationFn: () => body(http.GET("/api/admin/audit/verify")) });
}

/** A file of the portal, kept under a name: a link alone would not be signed in. */
export async function download(path: string, name: string): Promise<void> {
  const response = await authorizedFetch(new Request(path));
  if (!response.ok) throw await PortalError.of(response);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** The address of a usage report as CSV. */
export function usageCsv({ since, until, by }: UsageQuery): string {
  const query = new URLSearchParams({ since, until, format: "csv" });
  for (const group of by) query.append("by", group);
  return `/api/admin/usage?${query}`;
}

function useAdminMutation<T, R>(mutationFn: (variables: T) => Promise<R>) {
  const queries = useQueryClient();
  return useMutation({ mutationFn, onSuccess: () => queries.invalidateQueries({ queryKey: ADMIN }) });
}

export function useChangeUser() {
  return useAdminMutation(({ id, ...change }: UserChange & { id: string }) =>
    body(http.PATCH("/api/admin/users/{user_id}", { params: { path: { user_id: id } }, body: change })),
  );
}

export function usePasswordLink() {
  return useAdminMutation((id: string) =>
    body(http.POST("/api/admin/users/{user_id}/password-reset", { params: { path: { user_id: id } } })),
  );
}

export function useSignUserOut() {
  return useAdminMutation((id: string) =>
    body(http.DELETE("/api/admin/users/{user_id}/sign-ins", { params: { path: { user_id: id } } })),
  );
}

export function useRevokeUserKey(user: string) {
  return useAdminMutation((key: string) =>
    body(
      http.DELETE("/api/admin/users/{user_id}/keys/{key_id}", {
        params: { path: { user_id: user, key_id: key } },
      }),
    ),
  );
}

export function useInvite() {
  return useAdminMutation((invitation: NewInvitation) =>
    body(http.POST("/api/admin/invitations", { body: invitation })),
  );
}

export function useTakeInvitationBack() {
  return useAdminMutation((id: string) =>
    body(http.DELETE("/api/admin/invitations/{link_id}", { params: { path: { link_id: id } } })),
  );
}

export function useDefineRole() {
  return useAdminMutation(({ name, role }: { name: string; role: Role }) =>
    body(http.PUT("/api/admin/roles/{name}", { params: { path: { name } }, body: role })),
  );
}

export function useDeleteRole() {
  return useAdminMutation((name: string) =>
    body(http.DELETE("/api/admin/roles/{name}", { params: { path: { name } } })),
  );
}

export function useSetLimits() {
  return useAdminMutation(({ subject, limits }: { subject: string; limits: Limits }) =>
    body(http.PUT("/api/admin/limits/{subject}", { params: { path: { subject } }, body: limits })),
  );
}

export function useClearLimits() {
  return useAdminMutation((subject: string) =>
    body(http.DELETE("/api/admin/limits/{subject}", { params: { path: { subject } } })),
  );
}
