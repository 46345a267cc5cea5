import { useQuery } from "@tanstack/react-query";
import { llmAPI } from "../api";
import { body, http } from "../client/http";

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
