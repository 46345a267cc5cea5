import { ScrollArea, Table } from "@mantine/core";
import type { ReactNode } from "react";

interface Props {
  /** What is in it, for those who reach it by keyboard and hear it. */
  label: string;
  minWidth: number;
  children: ReactNode;
}

/** A table that scrolls in itself, also by keyboard, where the page is too narrow for it. */
export function WideTable({ label, minWidth, children }: Props) {
  return (
    <ScrollArea viewportProps={{ tabIndex: 0, role: "region", "aria-label": label }}>
      <Table miw={minWidth} verticalSpacing={6}>
        {children}
      </Table>
    </ScrollArea>
  );
}
