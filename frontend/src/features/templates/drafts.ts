/** What a save of a template consists of. */
export interface Draft {
  title: string;
  description: string;
  content: string;
}

export const BLANK: Draft = { title: "", description: "", content: "" };

export const EXAMPLE: Draft = {
  title: "Maze guide",
  description: "Helps a player out of a maze without giving the way away.",
  content: `You are {{ name }}, a guide in a maze.

The player is {{ age }} years old, so use words they know. Give one hint at a time, in one or two
sentences, and never the whole way.
{% if mood is defined %}
Today you are {{ mood }}.
{% endif %}`,
};

/** A draft as a save is, without whatever else is known of it. */
export function draftOf({ title, description, content }: Draft): Draft {
  return { title, description, content };
}

/** Whether two drafts would be the same save. */
export function isSame(one: Draft, other: Draft): boolean {
  return (
    one.title.trim() === other.title.trim() &&
    one.description.trim() === other.description.trim() &&
    one.content === other.content
  );
}
