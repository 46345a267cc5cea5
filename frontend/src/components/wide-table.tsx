import { ScrollArea, Table, type TableProps } from "@mantine/core";
import classes from "./wide-table.module.css";

interface Props extends TableProps {
  /** What is in it, for those who reach it by keyboard and hear it. */
  label: string;
  minWidth?: number;
}

/** A table that scrolls in itself, also by keyboard, where the page is too narrow for it. */
export function WideTable({ label, minWidth = 0, ...table }: Props) {
  return (
    // With a bar that stays: a phone shows no other sign of the columns that are out of sight.
    <ScrollArea
      type="auto"
      offsetScrollbars="present"
      viewportProps={{ tabIndex: 0, role: "region", "aria-label": label }}
    >
      <Table miw={minWidth} verticalSpacing={6} className={classes["table"] ?? ""} {...table} />
    </ScrollArea>
  );
}
