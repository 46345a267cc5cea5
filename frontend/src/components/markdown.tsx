import { Anchor, Code, Table, Typography } from "@mantine/core";
import { memo } from "react";
import ReactMarkdown, { type Components } from "react-markdown";
import rehypeHighlight from "rehype-highlight";
import remarkGfm from "remark-gfm";
import { CodeBlock } from "./code-block";
import classes from "./markdown.module.css";

/**
 * What a model wrote, as Markdown. HTML in it is shown as text, addresses have harmless schemes only, and
 * images are links: nothing is fetched because a model named it.
 */
export const Markdown = memo(function Markdown({ text }: { text: string }) {
  return (
    <Typography className={classes["markdown"] ?? ""}>
      <ReactMarkdown remarkPlugins={[remarkGfm]} rehypePlugins={[rehypeHighlight]} components={COMPONENTS}>
        {text}
      </ReactMarkdown>
    </Typography>
  );
});

const COMPONENTS: Components = {
  a: ({ href, children }) => <Outside href={href}>{children}</Outside>,
  img: ({ src, alt }) => (
    <Outside href={typeof src === "string" ? src : undefined}>{alt || src || "an image"} (image)</Outside>
  ),
  pre: ({ children }) => <CodeBlock>{children}</CodeBlock>,
  code: ({ className, children }) =>
    className?.includes("hljs") ? <code className={className}>{children}</code> : <Code>{children}</Code>,
  table: ({ children }) => (
    <Table.ScrollContainer minWidth={0}>
      <Table withTableBorder withColumnBorders>
        {children}
      </Table>
    </Table.ScrollContainer>
  ),
};

function Outside({ href, children }: { href: string | undefined; children: React.ReactNode }) {
  if (!href) return <span>{children}</span>;
  return (
    <Anchor href={href} target="_blank" rel="noopener noreferrer nofollow" underline="always" inherit>
      {children}
    </Anchor>
  );
}
