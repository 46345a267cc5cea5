let last: HTMLElement | undefined;

/** Notes which element had the focus last, of those that stay when menus and dialogs close. */
export function watchFocus(): void {
  document.addEventListener("focusin", ({ target }) => {
    if (target instanceof HTMLElement && !isInPopup(target)) last = target;
  });
}

/**
 * Gives the focus back when a dialog has closed. Mantine gives it to what had it when the dialog opened, which is gone
 * where that was in a menu or in another dialog; then nobody has it.
 */
export function returnFocus(): void {
  // The dialog itself goes only after this call.
  setTimeout(() => {
    if (document.activeElement !== document.body) return;
    (last?.isConnected ? last : document.getElementById("main"))?.focus({ preventScroll: true });
  });
}

/** Whether something is in a menu or a dialog. */
export function isInPopup(target: EventTarget | null): boolean {
  return target instanceof Element && target.closest("[role=menu], [role=dialog]") !== null;
}
