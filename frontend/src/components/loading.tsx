import { Loader } from "@mantine/core";

interface Props {
  /** What is waited for, for those who hear and do not see: "Loading the templates". */
  label: string;
  mx?: "auto";
}

/** A turning ring. ARIA lets only what has a role be named, and a ring by itself has none. */
export function Loading({ label, ...margins }: Props) {
  return <Loader role="status" aria-label={label} {...margins} />;
}
