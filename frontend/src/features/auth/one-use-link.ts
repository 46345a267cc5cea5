import { useState } from "react";

/**
 * The secret of a one-use link, which is behind `#` in the address. It is taken out of the address at once, so that
 * it is in no history and on no screenshot, and kept in the tab until `forget` is called: a reload must not lose it.
 */
export function useLinkSecret(): { secret: string; forget: () => void } {
  const [{ secret, name }] = useState(() => {
    const { hash, pathname } = window.location;
    const name = `link:${pathname}`;
    if (hash !== "") {
      sessionStorage.setItem(name, hash.slice(1));
      window.history.replaceState(window.history.state, "", pathname);
    }
    return { secret: sessionStorage.getItem(name) ?? "", name };
  });
  return { secret, forget: () => sessionStorage.removeItem(name) };
}
