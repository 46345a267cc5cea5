import { type QueryClient, useQueryClient } from "@tanstack/react-query";
import { useCallback, useSyncExternalStore } from "react";
import { whenSignedOut } from "../../client/auth";
import { refreshHistory, sessionKeys } from "../../queries/sessions";
import type { LiveTurn } from "./live-turn";
import { LiveTurns } from "./live-turns";

const stores = new WeakMap<QueryClient, LiveTurns>();

/** The page's turns: they go on while one looks at other pages of the portal. */
export function useLiveTurns(): LiveTurns {
  const queries = useQueryClient();
  let store = stores.get(queries);
  if (store === undefined) {
    store = new LiveTurns((sessionId) => {
      void refreshHistory(queries, sessionId);
      void queries.invalidateQueries({ queryKey: sessionKeys.all });
    });
    stores.set(queries, store);
    whenSignedOut(() => store?.clear());
    window.addEventListener("online", () => store?.allAgain());
  }
  return store;
}

/** A turn as it goes on; it is followed from its beginning if it is not already. */
export function useLiveTurn(turnId: string, sessionId: string): LiveTurn | undefined {
  const turns = useLiveTurns();
  const subscribe = useCallback(
    (watcher: () => void) => turns.watch(turnId, sessionId, watcher),
    [turns, turnId, sessionId],
  );
  return useSyncExternalStore(subscribe, () => turns.get(turnId));
}
