import { Anchor, Code, Typography } from "@mantine/core";
import { createContext, memo, type ReactNode, useContext, useId } from "react";
import ReactMarkdown, { type Components } from "react-markdown";
import rehypeHighlight from "rehype-highlight";
import remarkGfm from "remark-gfm";
import { CodeBlock } from "./code-block";
import classes from "./markdown.module.css";
import { WideTable } from "./wide-table";

/**
 * What a model wrote, as Markdown. HTML in it is shown as text, addresses have harmless schemes only, and
 * images are links: nothing is fetched because a model named it.
 */
export const Markdown = memo(function Markdown({ text }: { text: string }) {
  return (
    <Typography className={classes["markdown"] ?? ""}>
      <ReactMarkdown
        remarkPlugins={[remarkGfm]}
        remarkRehypeOptions={{ clobberPrefix: useId() }}
        rehypePlugins={[rehypeHighlight]}
        components={COMPONENTS}
      >
        {text}
      </ReactMarkdown>
    </Typography>
  );
});

const COMPONENTS: Components = {
  a: ({ node: _, href, children, ...others }) =>
    href?.startsWith("#") ? (
      <Anchor href={href} underline="always" inherit {...others}>
        {children}
      </Anchor>
    ) : (
      <Outside href={href}>{children}</Outside>
    ),
  img: ({ src, alt }) => (
    <Outside href={typeof src === "string" ? src : undefined}>{alt || src || "an image"} (image)</Outside>
  ),
  pre: ({ children }) => <CodeBlock>{children}</CodeBlock>,
  code: ({ className, children }) =>
    className?.includes("hljs") ? <code className={className}>{children}</code> : <Code>{children}</Code>,
  table: ({ children }) => (
    <WideTable label="Table" withTableBorder withColumnBorders>
      {children}
    </WideTable>
  ),
};

const InLink = createContext(false);

/** A link that leads away from the portal. What leads nowhere else is text, and so is an image in another link. */
function Outside({ href, children }: { href: string | undefined; children: ReactNode }) {
  const isInLink = useContext(InLink);
  if (isInLink || !href || !/^([a-z][a-z0-9+.-]*:|\/\/)/i.test(href)) return <span>{children}</span>;
  return (
    <Anchor href={href} target="_blank" rel="noopener noreferrer nofollow" underline="always" inherit>
      <InLink value={true}>{children}</InLink>
    </Anchor>
  );
}
