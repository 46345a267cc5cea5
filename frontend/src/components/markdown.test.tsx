import { MantineProvider } from "@mantine/core";
import { renderToStaticMarkup } from "react-dom/server";
import { describe, expect, it } from "vitest";
import { Markdown } from "./markdown";

function render(...texts: string[]): string {
  return renderToStaticMarkup(
    <MantineProvider>
      {texts.map((text) => (
        <Markdown key={text} text={text} />
      ))}
    </MantineProvider>,
  );
}

const anchors = (html: string) => html.match(/<a [^>]*>/g) ?? [];

describe("Markdown", () => {
  it("opens what is elsewhere in another tab", () => {
    const [anchor] = anchors(render("[there](https://example.org/a)"));
    expect(anchor).toContain('target="_blank"');
  });

  it("stays on the page with footnotes, each among those of its own text", () => {
    const html = render("One[^1].\n\n[^1]: Its note.", "Two[^1].\n\n[^1]: Its note.");
    const targets = anchors(html).map((anchor) => /href="#([^"]*)"/.exec(anchor)?.[1]);
    expect(new Set(targets).size).toBe(4);
    for (const target of targets) expect(html).toContain(`id="${target}"`);
    expect(html).not.toContain("_blank");
  });

  it("shows as text what leads nowhere but to the portal", () => {
    expect(anchors(render("[here](docs/setup.md), [and](/admin)"))).toEqual([]);
  });

  it("has no link in a link where an image is one", () => {
    const html = render("[![A maze](https://example.org/maze.png)](https://example.org/)");
    expect(anchors(html)).toHaveLength(1);
    expect(html).toContain("A maze (image)");
  });

  it("lets who has no mouse scroll a table", () => {
    const html = render("| A | B |\n| - | - |\n| 1 | 2 |");
    expect(html).toMatch(/tabindex="0" role="region" aria-label="Table"/);
  });
});
