import {
  ActionIcon,
  Badge,
  Button,
  Grid,
  Group,
  Menu,
  Stack,
  Tabs,
  Text,
  Textarea,
  TextInput,
  Title,
  Tooltip,
} from "@mantine/core";
import { useHotkeys } from "@mantine/hooks";
import { IconDots, IconMessagePlus, IconTrash } from "@tabler/icons-react";
import { useState } from "react";
import { flushSync } from "react-dom";
import { Link, useNavigate, useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import type { Template } from "../../client/schema";
import { Ago } from "../../components/ago";
import { ErrorNotice } from "../../components/error-notice";
import { notifyError, notifyUndoable } from "../../components/notify";
import {
  useCreateTemplate,
  useDeleteTemplate,
  useRestoreTemplate,
  useSaveTemplate,
  useTemplate,
} from "../../queries/templates";
import { type Draft, isSame } from "./drafts";
import { LeaveGuard } from "./leave-guard";
import { PreviewPanel } from "./preview-panel";
import classes from "./templates.module.css";
import { VersionsPanel } from "./versions-panel";

const LONGEST_TITLE = 200;
const LONGEST_DESCRIPTION = 2000;

interface Props {
  /** The newest version that is saved; none for a new template. */
  saved: Template | undefined;
  initial: Draft;
}

/** Edits a template beside a preview of its prompt and its versions. Ctrl+S saves. */
export function TemplateEditor({ saved, initial }: Props) {
  const [draft, setDraft] = useState<Draft>(initial);
  // The version that the draft was begun from: another save meanwhile is a conflict.
  const [base, setBase] = useState(saved);
  const [query] = useSearchParams();
  const saving = useSaving(draft, base, setBase);
  const isDirty = base === undefined ? !isSame(draft, initial) || draft.content !== "" : !isSame(draft, base);
  const canSave = isDirty && draft.title.trim() !== "" && draft.content !== "";
  useHotkeys([["mod+S", () => canSave && saving.save()]], []);

  const set = (change: Partial<Draft>) => setDraft((before) => ({ ...before, ...change }));
  const pick = ({ title, description, content }: Draft) => setDraft({ title, description, content });
  return (
    <Stack className={classes["page"] ?? ""} gap="md">
      <title>{`${base?.title ?? "New template"} · Prompt Portal`}</title>
      <LeaveGuard when={isDirty && !saving.isDone} />
      <Group justify="space-between">
        <Group gap="xs">
          <Title order={1} size="h3">
            {base?.title ?? "New template"}
          </Title>
          {base && (
            <Badge variant="light" tt="none">
              v{base.version}
            </Badge>
          )}
          {base && (
            <Text size="sm" c="dimmed" role="status">
              {isDirty ? "Not saved yet" : <Ago time={base.saved_at} prefix="Saved " />}
            </Text>
          )}
        </Group>
        <Group gap="xs">
          {base && (
            <Button
              component={Link}
              to={`/chat?template=${base.id}`}
              variant="default"
              leftSection={<IconMessagePlus size={16} aria-hidden />}
            >
              Try in a chat
            </Button>
          )}
          <Tooltip label="Ctrl+S">
            <Button onClick={() => saving.save()} loading={saving.isBusy} disabled={!canSave}>
              Save
            </Button>
          </Tooltip>
          {base && <MoreMenu id={base.id} />}
        </Group>
      </Group>
      {saving.error && <SaveError saving={saving} onTheirs={pick} />}
      <Grid gap="lg">
        <Grid.Col span={{ base: 12, md: 6 }}>
          <Stack gap="sm">
            <TextInput
              label="Title"
              required
              maxLength={LONGEST_TITLE}
              value={draft.title}
              onChange={(event) => set({ title: event.currentTarget.value })}
            />
            <TextInput
              label="Description"
              maxLength={LONGEST_DESCRIPTION}
              value={draft.description}
              onChange={(event) => set({ description: event.currentTarget.value })}
            />
            <Textarea
              label="Text"
              description="{{ name }} stands for a variable; Jinja’s if, for and filters work too."
              required
              autosize
              minRows={12}
              maxRows={30}
              spellCheck={false}
              className={classes["content"] ?? ""}
              value={draft.content}
              onChange={(event) => set({ content: event.currentTarget.value })}
            />
          </Stack>
        </Grid.Col>
        <Grid.Col span={{ base: 12, md: 6 }}>
          <Tabs defaultValue={query.has("version") ? "versions" : "preview"}>
            <Tabs.List mb="sm">
              <Tabs.Tab value="preview">Preview</Tabs.Tab>
              <Tabs.Tab value="versions" disabled={base === undefined}>
                Versions
              </Tabs.Tab>
            </Tabs.List>
            <Tabs.Panel value="preview">
              <PreviewPanel content={draft.content} />
            </Tabs.Panel>
            <Tabs.Panel value="versions">
              {base && <VersionsPanel template={base} draft={draft} onPick={pick} />}
            </Tabs.Panel>
          </Tabs>
        </Grid.Col>
      </Grid>
    </Stack>
  );
}

function useSaving(draft: Draft, base: Template | undefined, setBase: (saved: Template) => void) {
  const create = useCreateTemplate();
  const update = useSaveTemplate(base?.id ?? "");
  const newest = useTemplate(base?.id ?? "new", base !== undefined);
  const navigate = useNavigate();
  const [error, setError] = useState<PortalError>();
  const [isDone, setDone] = useState(false);

  const save = async (basedOn = base?.version) => {
    setError(undefined);
    try {
      if (base === undefined) {
        const made = await create.mutateAsync(draft);
        flushSync(() => setDone(true)); // the guard must let this very change of page pass
        void navigate(`/templates/${made.id}`, { replace: true });
      } else {
        const next = await update.mutateAsync({ ...draft, based_on: basedOn ?? base.version });
        setBase(next);
      }
    } catch (thrown) {
      const failure = PortalError.from(thrown);
      if (failure.code === "conflict") await newest.refetch();
      setError(failure);
    }
  };
  const isBusy = create.isPending || update.isPending;
  return { save, error, setError, isBusy, isDone, newest, setBase };
}

function SaveError({
  saving,
  onTheirs,
}: {
  saving: ReturnType<typeof useSaving>;
  onTheirs: (draft: Draft) => void;
}) {
  const { error, newest, save, setBase, setError } = saving;
  if (error === undefined) return null;
  if (error.code !== "conflict" || newest.data === undefined) {
    return <ErrorNotice error={error} onRetry={() => void save()} />;
  }
  const theirs = newest.data;
  return (
    <Stack gap="xs">
      <ErrorNotice error={new PortalError("changed", `Version ${theirs.version} was saved meanwhile.`)} />
      <Group>
        <Button size="xs" variant="default" onClick={() => void save(theirs.version)}>
          Save mine as version {theirs.version + 1}
        </Button>
        <Button
          size="xs"
          variant="default"
          onClick={() => {
            setBase(theirs);
            onTheirs(theirs);
            setError(undefined);
          }}
        >
          Take theirs and drop mine
        </Button>
      </Group>
    </Stack>
  );
}

function MoreMenu({ id }: { id: string }) {
  const { mutateAsync: deleteTemplate } = useDeleteTemplate();
  const { mutateAsync: restoreTemplate } = useRestoreTemplate();
  const navigate = useNavigate();
  const remove = () =>
    deleteTemplate(id)
      .then(() => {
        void navigate("/templates");
        notifyUndoable("The template is deleted.", () => restoreTemplate(id));
      })
      .catch(notifyError);
  return (
    <Menu position="bottom-end" shadow="md">
      <Menu.Target>
        <ActionIcon variant="subtle" color="gray" size="lg" aria-label="What to do with this template">
          <IconDots size={18} />
        </ActionIcon>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Item
          color="red"
          leftSection={<IconTrash size={16} aria-hidden />}
          onClick={() => void remove()}
        >
          Delete
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}
