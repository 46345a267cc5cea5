import { Center } from "@mantine/core";
import { useQueryClient } from "@tanstack/react-query";
import { type ReactNode, useEffect, useState, useSyncExternalStore } from "react";
import { Navigate, useLocation } from "react-router";
import { authStore, renew, whenSignedOut } from "../client/auth";
import { PortalError } from "../client/errors";
import { ErrorNotice } from "./error-notice";
import { Loading } from "./loading";

/** Shows its children to whoever is signed in, and sends all others to the sign-in and back. */
export function RequireSignIn({ children }: { children: ReactNode }) {
  const status = useSyncExternalStore(authStore.subscribe, authStore.snapshot);
  const [error, setError] = useState<PortalError>();
  const location = useLocation();
  const queries = useQueryClient();

  useEffect(() => {
    if (status === "unknown" && error === undefined) {
      renew().catch((thrown: unknown) => setError(PortalError.from(thrown)));
    }
  }, [status, error]);
  useEffect(() => whenSignedOut(() => queries.clear()), [queries]);

  if (status === "in") return children;
  if (status === "left") return <Navigate to="/sign-in" replace />;
  if (status === "out") return <Navigate to="/sign-in" replace state={{ from: location }} />;
  return (
    <Center h="100dvh" p="md">
      {error ? (
        <ErrorNotice error={error} onRetry={() => setError(undefined)} />
      ) : (
        <Loading label="Signing in" />
      )}
    </Center>
  );
}
