import { Select, Tooltip } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { notifyError } from "../../components/notify";
import { useMay } from "../../queries/access";
import { useChooseModel, useModels } from "../../queries/models";
import classes from "./conversation.module.css";

/** Which model answers in my chats; nothing where there is no choice. */
export function ModelChoice() {
  const { data } = useModels();
  const choose = useChooseModel();
  const may = useMay();
  const [isOpen, { open, close }] = useDisclosure();
  if (data === undefined || data.models.length < 2 || !may("chat:use")) return null;
  const choices = data.models.map(({ name, health }) => ({
    value: name,
    label: health.status === "down" ? `${name} (down)` : name,
    disabled: health.status === "down" && name !== data.default.model,
  }));
  return (
    // Beside the open choices it would lie over them.
    <Tooltip
      label={data.default.note ?? "The model that answers in your chats"}
      multiline
      maw={280}
      disabled={isOpen}
    >
      <Select
        aria-label="Model"
        size="xs"
        className={classes["model"] ?? ""}
        allowDeselect={false}
        data={choices}
        disabled={choose.isPending}
        value={choose.isPending ? choose.variables : data.default.model}
        onDropdownOpen={open}
        onDropdownClose={close}
        onChange={(name) => name !== null && choose.mutate(name, { onError: notifyError })}
      />
    </Tooltip>
  );
}
