import { useState } from "react";

/**
 * The secret of a one-use link, which is behind `#` in the address. It is taken out of the address at once, so that
 * it is in no history and on no screenshot.
 */
export function useLinkSecret(): string {
  const [secret] = useState(() => {
    const { hash, pathname } = window.location;
    if (hash !== "") window.history.replaceState(window.history.state, "", pathname);
    return hash.slice(1);
  });
  return secret;
}
