import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";

const answers: Response[] = [];
const asked: string[] = [];
const replace = vi.fn();

function tokenOf(person: string): Response {
  const claims = btoa(JSON.stringify({ sub: person })).replaceAll("=", "");
  return Response.json({ access_token: `header.${claims}.${asked.length}` });
}

beforeEach(() => {
  vi.resetModules();
  vi.stubGlobal("fetch", async (input: string | Request) => {
    asked.push(typeof input === "string" ? input : new URL(input.url).pathname);
    return answers.shift();
  });
  vi.stubGlobal("window", { location: { replace } });
});

afterEach(() => {
  vi.unstubAllGlobals();
  vi.clearAllMocks();
  answers.length = 0;
  asked.length = 0;
});

async function signedInAs(person: string) {
  const auth = await import("./auth");
  answers.push(tokenOf(person));
  await auth.signIn({ username: person, password: "secret" });
  asked.length = 0;
  return auth;
}

describe("a request whose token has run out", () => {
  const request = () => new Request("http://portal/api/things", { method: "POST", body: "mine" });

  it("is repeated with a new token of the same person", async () => {
    const { authorizedFetch } = await signedInAs("ada");
    answers.push(new Response(null, { status: 401 }), tokenOf("ada"), new Response("done"));
    expect(await (await authorizedFetch(request())).text()).toBe("done");
    expect(asked).toEqual(["/api/things", "/api/auth/refresh", "/api/things"]);
    expect(replace).not.toHaveBeenCalled();
  });

  it("does not become that of somebody else who signed in in another tab", async () => {
    const { authorizedFetch, authStore, whenSignedOut } = await signedInAs("ada");
    const forget = vi.fn();
    whenSignedOut(forget);
    answers.push(new Response(null, { status: 401 }), tokenOf("bob"));
    expect((await authorizedFetch(request())).status).toBe(401);
    expect(asked).toEqual(["/api/things", "/api/auth/refresh"]);
    expect(forget).toHaveBeenCalled();
    expect(authStore.snapshot()).toBe("left");
    expect(replace).toHaveBeenCalledWith("/");
  });
});
