import { useCallback, useSyncExternalStore } from "react";
import { whenSignedOut } from "../../client/auth";
import { forgetAll } from "../../client/tab-storage";

const PREFIX = "draft:";
const listeners = new Set<() => void>();

/** Texts that are not sent yet, by their names. They survive a reload of the page, but neither the tab nor the
 * sign-in. */
export const drafts = {
  get: (name: string): string => sessionStorage.getItem(PREFIX + name) ?? "",

  set(name: string, text: string): void {
    if (text === "") sessionStorage.removeItem(PREFIX + name);
    else sessionStorage.setItem(PREFIX + name, text);
    tell();
  },

  /** Forgets a text that has served. What was written since stays. */
  clear(name: string, served: string): void {
    if (drafts.get(name) === served) drafts.set(name, "");
  },
};

whenSignedOut(() => {
  forgetAll(PREFIX);
  tell();
});

function tell(): void {
  for (const listener of listeners) listener();
}

function subscribe(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** The draft of that name, and how it is changed. */
export function useDraft(name: string): [string, (text: string) => void] {
  const draft = useSyncExternalStore(subscribe, () => drafts.get(name));
  return [draft, useCallback((text) => drafts.set(name, text), [name])];
}
