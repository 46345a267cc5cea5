import { expect, it } from "vitest";
import { actionOf } from "./composer-keys";

const ENTER = { key: "Enter", keyCode: 13, shiftKey: false, isComposing: false };

it.each([
  ["Enter sends", ENTER, false, "send"],
  ["Shift+Enter begins a line", { ...ENTER, shiftKey: true }, false, undefined],
  ["Enter begins a line where there is no Shift+Enter", ENTER, true, undefined],
  ["Escape stops", { ...ENTER, key: "Escape", keyCode: 27 }, true, "stop"],
  ["Enter ends a word that is composed", { ...ENTER, isComposing: true }, false, undefined],
  ["Enter ends a word that is composed, in Safari", { ...ENTER, keyCode: 229 }, false, undefined],
])("%s", (_, key, isTouch, action) => {
  expect(actionOf(key, isTouch)).toBe(action);
});
