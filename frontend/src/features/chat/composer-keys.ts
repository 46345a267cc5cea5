/** The code of a key that an input method takes for itself. */
const OF_INPUT_METHOD = 229;

type Key = Pick<KeyboardEvent, "key" | "keyCode" | "shiftKey" | "isComposing">;

/** What a key does in the box to write in, where it does not just write. */
export function actionOf(key: Key, isTouch: boolean): "send" | "stop" | undefined {
  // While a word is being composed, Enter and Escape belong to the input method. Safari says that the word is
  // done before it tells of the Enter that did it.
  if (key.isComposing || key.keyCode === OF_INPUT_METHOD) return undefined;
  if (key.key === "Escape") return "stop";
  // The keyboard on a phone's screen has no Shift+Enter.
  return key.key === "Enter" && !key.shiftKey && !isTouch ? "send" : undefined;
}
