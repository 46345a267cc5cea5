let unsaved = 0;

/** Notes that something on the page is not saved, until what it gives back is called. */
export function markUnsaved(): () => void {
  unsaved += 1;
  return () => {
    unsaved -= 1;
  };
}

/** Whether something on the page would be lost with it. */
export function isUnsaved(): boolean {
  return unsaved > 0;
}
