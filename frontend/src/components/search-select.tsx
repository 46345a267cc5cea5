import { Select, type SelectProps } from "@mantine/core";
import { useDebouncedCallback } from "@mantine/hooks";
import { SEARCH_AFTER_MS } from "./search";

interface Props extends Omit<SelectProps, "value" | "data" | "searchable" | "filter" | "onSearchChange"> {
  value: string | null;
  /** What the portal found; the chosen one has to be among it. */
  data: { value: string; label: string }[];
  /** Called with what to look for, once the typing pauses. */
  onSearch: (wanted: string) => void;
}

/** A choice among more than the page knows: what is typed is looked for at the portal. */
export function SearchSelect({ value, data, onSearch, ...props }: Props) {
  const search = useDebouncedCallback((typed: string) => {
    // The name of the chosen one is in the box too, and nobody looks for that.
    const isChosen = data.some((one) => one.value === value && one.label === typed);
    onSearch(isChosen ? "" : typed.trim());
  }, SEARCH_AFTER_MS);
  return (
    <Select
      {...props}
      searchable
      filter={({ options }) => options}
      data={data}
      value={value}
      onSearchChange={search}
    />
  );
}
