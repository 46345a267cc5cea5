import { type ReactNode, useRef } from "react";
import classes from "./code-block.module.css";
import { CopyButton } from "./copy-button";

/** A block of code that scrolls by itself and can be copied. */
export function CodeBlock({ children }: { children: ReactNode }) {
  const block = useRef<HTMLPreElement>(null);
  return (
    <div className={classes["frame"]}>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keyboard */}
      <pre ref={block} className={classes["code"]} tabIndex={0}>
        {children}
      </pre>
      <div className={classes["copy"]}>
        <CopyButton label="Copy the code" text={() => block.current?.textContent ?? ""} />
      </div>
    </div>
  );
}
