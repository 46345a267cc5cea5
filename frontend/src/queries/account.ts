import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { llmAPI } from "../api";
import { renew } from "../client/auth";
import { body, http } from "../client/http";
import type { PasswordChange } from "../client/schema";

const HEALTH_EVERY_MS = 15_000;

export function useAccount() {
  return useQuery({
    queryKey: ["account"],
    queryFn: () => body(http.GET("/api/auth/me")),
    staleTime: Number.POSITIVE_INFINITY,
  });
}

export function useHealth() {
  return useQuery({
    queryKey: ["health"],
    queryFn: async () => (await llmAPI.health()).data,
    refetchInterval: HEALTH_EVERY_MS,
  });
}

const SIGN_INS = ["sign-ins"] as const;

export function useSignIns() {
  return useQuery({
    queryKey: SIGN_INS,
    queryFn: async () => (await body(http.GET("/api/auth/sign-ins"))).sign_ins,
  });
}

/** Ends the sign-in with the id, or all of them, this one too, where there is none. */
export function useEndSignIn() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: async (id: string | undefined) => {
      if (id === undefined) {
        await body(http.DELETE("/api/auth/sign-ins"));
        await renew(); // finds that nobody is signed in any more
      } else {
        await body(http.DELETE("/api/auth/sign-ins/{sign_in_id}", { params: { path: { sign_in_id: id } } }));
      }
    },
    onSuccess: () => queries.invalidateQueries({ queryKey: SIGN_INS }),
  });
}

export function useChangePassword() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: (change: PasswordChange) => body(http.PUT("/api/auth/password", { body: change })),
    onSuccess: () => queries.invalidateQueries({ queryKey: SIGN_INS }),
  });
}
