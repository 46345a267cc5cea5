/** Copies a text; throws where the browser does not let it. */
export async function copy(text: string): Promise<void> {
  // It is missing where the page did not come over HTTPS or from this machine.
  if (navigator.clipboard !== undefined) return navigator.clipboard.writeText(text);
  const focused = document.activeElement as HTMLElement;
  const box = document.createElement("textarea");
  box.value = text;
  focused.after(box); // a dialog lets the focus go nowhere else
  box.focus({ preventScroll: true });
  box.select();
  const isCopied = document.execCommand("copy");
  box.remove();
  focused.focus({ preventScroll: true });
  if (!isCopied)
    throw new Error("The browser does not let this page copy: select the text, and copy it yourself.");
}
