import { Badge, Button, Group, NavLink, Stack, Text } from "@mantine/core";
import { IconArrowBackUp } from "@tabler/icons-react";
import { type Change, diffLines } from "diff";
import { useSearchParams } from "react-router";
import type { Template } from "../../client/schema";
import { Ago } from "../../components/ago";
import { Loaded } from "../../components/loaded";
import { useTemplateVersions } from "../../queries/templates";
import { type Draft, isSame } from "./drafts";
import classes from "./templates.module.css";

interface Props {
  template: Template;
  draft: Draft;
  /** Puts an older version into the editor, to be saved as the newest. */
  onPick: (version: Draft) => void;
}

/** The versions of a template, and how the chosen one differs from what is in the editor. */
export function VersionsPanel({ template, draft, onPick }: Props) {
  const versions = useTemplateVersions(template.id);
  return (
    <Loaded query={versions} label="the versions">
      {(data) => <Versions versions={data} draft={draft} onPick={onPick} />}
    </Loaded>
  );
}

function Versions({ versions, draft, onPick }: Omit<Props, "template"> & { versions: Template[] }) {
  const [query, setQuery] = useSearchParams();
  const chosen = versions.find(({ version }) => version === Number(query.get("version")));
  const choose = ({ version }: Template) =>
    setQuery({ version: String(version) }, { replace: true, preventScrollReset: true });
  return (
    <Stack gap="sm">
      <div>
        {versions.map((version) => (
          <NavLink
            key={version.version}
            component="button"
            active={version === chosen}
            aria-pressed={version === chosen}
            label={
              <Group gap="xs" wrap="nowrap">
                <Badge variant="light" tt="none" flex="none">
                  v{version.version}
                </Badge>
                <Text size="sm" truncate>
                  {version.title}
                </Text>
              </Group>
            }
            rightSection={
              <Text size="xs">
                <Ago time={version.saved_at} />
              </Text>
            }
            onClick={() => choose(version)}
          />
        ))}
      </div>
      {chosen && (
        <Stack gap="xs">
          <Group justify="space-between">
            <Text size="sm" fw={500}>
              From version {chosen.version} to the editor
            </Text>
            <Button
              size="xs"
              variant="default"
              leftSection={<IconArrowBackUp size={14} aria-hidden />}
              disabled={isSame(chosen, draft)}
              onClick={() => onPick(chosen)}
            >
              Put version {chosen.version} into the editor
            </Button>
          </Group>
          {/* biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by keyboard */}
          <section className={classes["prompt"]} aria-label="Changes" tabIndex={0}>
            <Difference from={chosen.content} to={draft.content} />
          </section>
        </Stack>
      )}
    </Stack>
  );
}

function Difference({ from, to }: { from: string; to: string }) {
  return diffLines(from, to).map((change, place) => (
    // biome-ignore lint/suspicious/noArrayIndexKey: the changes have no other identity than their place
    <Lines key={place} change={change} />
  ));
}

function Lines({ change: { added, removed, value } }: { change: Change }) {
  if (added) return <ins>{value}</ins>;
  if (removed) return <del>{value}</del>;
  return value;
}
