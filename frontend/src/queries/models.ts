import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { body, http } from "../client/http";

const MODELS = ["models"] as const;

/** The models that I may use, and which one answers me. */
export function useModels() {
  return useQuery({
    queryKey: MODELS,
    queryFn: () => body(http.GET("/api/models")),
    staleTime: 10_000,
  });
}

/** Lets another model answer me where none is named. */
export function useChooseModel() {
  const queries = useQueryClient();
  return useMutation({
    mutationFn: (model: string) => body(http.PUT("/api/models/default", { body: { model } })),
    onSuccess: () => queries.invalidateQueries({ queryKey: MODELS }),
  });
}
