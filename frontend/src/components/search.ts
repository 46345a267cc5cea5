/** How long the typing pauses before what is typed is looked for. */
export const SEARCH_AFTER_MS = 200;
