import { forgetAll } from "../client/tab-storage";

const PREFIX = "unsaved:";
let open = 0;

/**
 * What is written and not saved, by names that tell whose it is. It is there for as long as the tab is: a sign-in that
 * is ended elsewhere must not take it away.
 */
export const unsaved = {
  get: (name: string): string | null => sessionStorage.getItem(PREFIX + name),
  set: (name: string, text: string): void => sessionStorage.setItem(PREFIX + name, text),
  remove: (name: string): void => sessionStorage.removeItem(PREFIX + name),

  /** For who signs out, and may leave the machine to somebody else. */
  removeAll: (): void => forgetAll(PREFIX),

  /** Notes that the page shows something that is not saved, until what it gives back is called. */
  mark(): () => void {
    open += 1;
    return () => {
      open -= 1;
    };
  },

  isShown: (): boolean => open > 0,
};
