import { useEffect, useState } from "react";
import type { Template } from "../../client/schema";
import { unsaved } from "../../components/unsaved";
import { type Draft, isSame } from "./drafts";

interface Edit {
  draft: Draft;
  /** The version that the draft was begun from: another save meanwhile is a conflict. None for a new template. */
  base?: Template | undefined;
}

/** What a person writes in an editor. As long as it is not saved it survives a reload and a sign-in, but not the tab. */
export function useEdit(person: string, saved: Template | undefined, initial: Draft) {
  const [edit, setEdit] = useState<Edit>(
    () => kept(nameOf(person, saved)) ?? { draft: initial, base: saved },
  );
  const { draft, base } = edit;
  const isDirty = !isSame(draft, base ?? initial);
  const name = nameOf(person, base);

  useEffect(() => {
    if (isDirty) unsaved.set(name, JSON.stringify(edit));
    else unsaved.remove(name);
  }, [isDirty, name, edit]);

  const forget = () => unsaved.remove(name);
  return {
    draft,
    base,
    isDirty,
    forget,
    set: (change: Partial<Draft>) =>
      setEdit((before) => ({ ...before, draft: { ...before.draft, ...change } })),
    /** Goes on from a version that is saved; what was written since then stays. */
    rebase: (next: Template) => {
      forget();
      setEdit((before) => ({ ...before, base: next }));
    },
  };
}

function nameOf(person: string, base: Template | undefined): string {
  return `template:${person}:${base?.id ?? "new"}`;
}

function kept(name: string): Edit | undefined {
  const text = unsaved.get(name);
  return text === null ? undefined : (JSON.parse(text) as Edit);
}
