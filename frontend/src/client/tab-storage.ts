/** Forgets all that the tab keeps under names that begin so. */
export function forgetAll(prefix: string): void {
  for (const name of Object.keys(sessionStorage)) {
    if (name.startsWith(prefix)) sessionStorage.removeItem(name);
  }
}
