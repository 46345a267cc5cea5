import { type QueryClient, useQueryClient } from "@tanstack/react-query";
import { useEffect, useSyncExternalStore } from "react";
import { sessionKeys } from "../../queries/sessions";
import type { LiveTurn } from "./live-turn";
import { LiveTurns } from "./live-turns";

const stores = new WeakMap<QueryClient, LiveTurns>();

/** The page's turns: they go on while one looks at other pages of the portal. */
export function useLiveTurns(): LiveTurns {
  const queries = useQueryClient();
  let store = stores.get(queries);
  if (store === undefined) {
    store = new LiveTurns((sessionId) => {
      const queryKey = sessionKeys.history(sessionId);
      // A first load that is on its way tells of the time before, and would not be begun again otherwise.
      void queries.cancelQueries({ queryKey }).then(() => queries.invalidateQueries({ queryKey }));
      void queries.invalidateQueries({ queryKey: sessionKeys.all });
    });
    stores.set(queries, store);
  }
  return store;
}

/** A turn as it goes on; it is followed from its beginning if it is not already. */
export function useLiveTurn(turnId: string, sessionId: string): LiveTurn | undefined {
  const turns = useLiveTurns();
  useEffect(() => turns.follow(turnId, sessionId), [turns, turnId, sessionId]);
  return useSyncExternalStore(turns.subscribe, () => turns.get(turnId));
}
