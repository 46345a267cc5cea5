import { Badge, Button, Group, NavLink, Stack, Text } from "@mantine/core";
import { IconArrowBackUp } from "@tabler/icons-react";
import { type Change, diffLines } from "diff";
import { useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import type { Template } from "../../client/schema";
import { Ago } from "../../components/ago";
import { ErrorNotice } from "../../components/error-notice";
import { Loading } from "../../components/loading";
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
  const { data, error, refetch } = useTemplateVersions(template.id);
  const [query, setQuery] = useSearchParams();
  const chosen = data?.find(({ version }) => version === Number(query.get("version")));
  if (error) return <ErrorNotice error={PortalError.from(error)} onRetry={() => void refetch()} />;
  if (data === undefined) return <Loading label="Loading the versions" />;
  return (
    <Stack gap="sm">
      <div>
        {data.map((version) => (
          <NavLink
            key={version.version}
            component="button"
            active={version === chosen}
            aria-pressed={version === chosen}
            label={
              <Group gap="xs" wrap="nowrap">
                <Badge variant="light" tt="none">
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
            onClick={() => setQuery({ version: String(version.version) }, { replace: true })}
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
