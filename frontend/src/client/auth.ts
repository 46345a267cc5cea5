import { PortalError } from "./errors";
import type { AccessToken, Login } from "./schema";

/** Whether somebody is signed in; `unknown` until the refresh cookie was tried, and `left` where it was ended
 * on purpose: whoever comes next does not go on where the last one was. */
export type AuthStatus = "unknown" | "in" | "out" | "left";

// The access token lives here and nowhere else: no storage that injected script could read later.
let accessToken: string | undefined;
let status: AuthStatus = "unknown";
let renewing: Promise<boolean> | undefined;
const listeners = new Set<() => void>();

function become(next: AuthStatus, token?: string): void {
  accessToken = token;
  status = next;
  for (const listener of listeners) listener();
}

/** The sign-in of this tab, as a store for `useSyncExternalStore`. */
export const authStore = {
  subscribe(listener: () => void): () => void {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },
  snapshot: (): AuthStatus => status,
};

/** Calls `forget` when nobody is signed in any more: what belonged to one person must not be shown to the next. */
export function whenSignedOut(forget: () => void): () => void {
  return authStore.subscribe(() => {
    if (status === "out" || status === "left") forget();
  });
}

async function post(path: string, body?: object): Promise<Response> {
  const init: RequestInit = { method: "POST" };
  if (body !== undefined) {
    init.headers = { "Content-Type": "application/json" };
    init.body = JSON.stringify(body);
  }
  return fetch(path, init);
}

/** Signs in, for this tab and, by a cookie that no script can read, for later visits. */
export async function signIn(login: Login): Promise<void> {
  const response = await post("/api/auth/login", login);
  if (!response.ok) throw await PortalError.of(response);
  become("in", ((await response.json()) as AccessToken).access_token);
}

/** Ends the sign-in. Without a portal to hear it, the cookie stays, and so does the sign-in. */
export async function signOut(): Promise<void> {
  const response = await post("/api/auth/logout");
  if (!response.ok) throw await PortalError.of(response);
  become("left");
}

/** Gets a new access token by the cookie; false where the person is not signed in any more. One at a time. */
export function renew(): Promise<boolean> {
  renewing ??= requestRenewal().finally(() => {
    renewing = undefined;
  });
  return renewing;
}

async function requestRenewal(): Promise<boolean> {
  const response = await post("/api/auth/refresh");
  if (response.status === 401) {
    become("out");
    return false;
  }
  if (!response.ok) throw await PortalError.of(response);
  const { access_token: renewed } = (await response.json()) as AccessToken;
  if (accessToken !== undefined && personOf(renewed) !== personOf(accessToken)) {
    // Somebody else has signed in in another tab. Nothing on this page may become theirs.
    become("left");
    window.location.replace("/");
    return false;
  }
  become("in", renewed);
  return true;
}

function personOf(token: string): unknown {
  const [, claims = ""] = token.split(".");
  return JSON.parse(atob(claims.replaceAll("-", "+").replaceAll("_", "/"))).sub;
}

/** `fetch` with the access token, which is renewed once when it has run out. */
export async function authorizedFetch(input: Request): Promise<Response> {
  const again = input.clone();
  const response = await fetch(authorized(input));
  if (response.status !== 401 || !(await renew())) return response;
  return fetch(authorized(again));
}

function authorized(request: Request): Request {
  if (accessToken !== undefined) request.headers.set("Authorization", `Bearer ${accessToken}`);
  return request;
}
