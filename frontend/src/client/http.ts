import createClient from "openapi-fetch";
import { authorizedFetch } from "./auth";
import { PortalError } from "./errors";
import type { paths } from "./schema";

/** The portal's HTTP API, typed by its OpenAPI document. */
export const http = createClient<paths>({ baseUrl: window.location.origin, fetch: authorizedFetch });

interface Answer<T> {
  data?: T;
  error?: unknown;
  response: Response;
}

/** The body of an answer. Throws `PortalError` for every answer that is no success. */
export async function body<T>(answering: Promise<Answer<T>>): Promise<T> {
  const { data } = await result(answering);
  return data;
}

/** The body and the status of an answer. Throws `PortalError` as `body` does. */
export async function result<T>(answering: Promise<Answer<T>>): Promise<{ data: T; status: number }> {
  const { data, error, response } = await answering.catch((thrown: unknown) => {
    throw PortalError.from(thrown);
  });
  if (!response.ok) throw PortalError.ofBody(error, response);
  return { data: data as T, status: response.status };
}
