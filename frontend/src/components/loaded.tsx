import type { UseQueryResult } from "@tanstack/react-query";
import type { ReactNode } from "react";
import { PortalError } from "../client/errors";
import { ErrorNotice } from "./error-notice";
import { Loading } from "./loading";

interface Props<T> {
  query: UseQueryResult<T>;
  /** What is loaded, for those who hear and do not see the loader. */
  label: string;
  children: (data: T) => ReactNode;
}

/** What a query gives, once it does; until then a loader, and an error with a way to try again. */
export function Loaded<T>({ query: { data, error, refetch }, label, children }: Props<T>) {
  return (
    <>
      {error && <ErrorNotice error={PortalError.from(error)} onRetry={() => void refetch()} />}
      {data === undefined && !error && <Loading label={`Loading ${label}`} />}
      {data !== undefined && children(data)}
    </>
  );
}
