import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { body, http } from "../client/http";
import type { TemplateBody, TemplateSave } from "../client/schema";

export const templateKeys = {
  all: ["templates"] as const,
  list: (search: string) => ["templates", "list", search] as const,
  one: (id: string) => ["templates", "one", id] as const,
  versions: (id: string) => ["templates", "versions", id] as const,
  preview: (content: string, variables: Variables) => ["preview", content, variables] as const,
};

/** Values for the variables of a template. */
export type Variables = Record<string, string>;

const LIST_LIMIT = 200;

export function useTemplates(search = "", enabled = true) {
  return useQuery({
    queryKey: templateKeys.list(search),
    queryFn: () => body(http.GET("/api/templates", { params: { query: { search, limit: LIST_LIMIT } } })),
    placeholderData: (before) => before,
    enabled,
  });
}

export function useTemplate(id: string, enabled = true) {
  return useQuery({
    queryKey: templateKeys.one(id),
    queryFn: () => body(http.GET("/api/templates/{template_id}", { params: { path: { template_id: id } } })),
    enabled,
  });
}

export function useTemplateVersions(id: string) {
  return useQuery({
    queryKey: templateKeys.versions(id),
    queryFn: async () =>
      (
        await body(
          http.GET("/api/templates/{template_id}/versions", { params: { path: { template_id: id } } }),
        )
      ).versions,
  });
}

/**
 * The prompt that a template makes, which need not be saved, with `‹name›` where a variable has no value.
 * What was there stays until the next comes.
 */
export function usePreview(content: string, variables: Variables) {
  return useQuery({
    queryKey: templateKeys.preview(content, variables),
    queryFn: async () => {
      const shown = await preview(content, variables);
      if (shown.missing.length === 0) return shown;
      const marks = Object.fromEntries(shown.missing.map((name) => [name, `‹${name}›`]));
      return { ...(await preview(content, { ...variables, ...marks })), missing: shown.missing };
    },
    enabled: content !== "",
    placeholderData: (before) => before,
    gcTime: 0,
    retry: false,
  });
}

function preview(content: string, variables: Variables) {
  return body(http.POST("/api/templates/preview", { body: { content, variables } }));
}

function useTemplateMutation<T, R>(mutationFn: (variables: T) => Promise<R>) {
  const queries = useQueryClient();
  return useMutation({
    mutationFn,
    onSuccess: () => queries.invalidateQueries({ queryKey: templateKeys.all }),
  });
}

export function useCreateTemplate() {
  const queries = useQueryClient();
  return useTemplateMutation(async (draft: TemplateBody) => {
    const made = await body(http.POST("/api/templates", { body: draft }));
    queries.setQueryData(templateKeys.one(made.id), made);
    return made;
  });
}

export function useSaveTemplate(id: string) {
  return useTemplateMutation((save: TemplateSave) =>
    body(http.PUT("/api/templates/{template_id}", { params: { path: { template_id: id } }, body: save })),
  );
}

export function useDeleteTemplate() {
  return useTemplateMutation((id: string) =>
    body(http.DELETE("/api/templates/{template_id}", { params: { path: { template_id: id } } })),
  );
}

export function useRestoreTemplate() {
  return useTemplateMutation((id: string) =>
    body(http.POST("/api/templates/{template_id}/restore", { params: { path: { template_id: id } } })),
  );
}
