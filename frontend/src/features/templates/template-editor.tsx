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
import { Link, type NavigateOptions, useNavigate, useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import type { Template } from "../../client/schema";
import { Ago } from "../../components/ago";
import { confirm } from "../../components/confirm";
import { ErrorNotice } from "../../components/error-notice";
import { notifyError, notifyUndoable } from "../../components/notify";
import {
  useCreateTemplate,
  useDeleteTemplate,
  useRestoreTemplate,
  useSaveTemplate,
  useTemplate,
} from "../../queries/templates";
import { type Draft, draftOf } from "./drafts";
import { LeaveGuard } from "./leave-guard";
import { PreviewPanel } from "./preview-panel";
import classes from "./templates.module.css";
import { useEdit } from "./use-edit";
import { VersionsPanel } from "./versions-panel";

const LONGEST_TITLE = 200;
const LONGEST_DESCRIPTION = 2000;

/** The state of the navigation from a new template to itself once it is saved: it stays in the same editor. */
export interface FirstSave {
  editor: "new";
}

interface Props {
  /** The id of the account that writes. */
  person: string;
  /** The newest version that is saved; none for a new template. */
  saved: Template | undefined;
  initial: Draft;
}

/** Edits a template beside a preview of its prompt and its versions. Ctrl+S saves. */
export function TemplateEditor({ person, saved, initial }: Props) {
  const edit = useEdit(person, saved, initial);
  const { draft, base, isDirty, set } = edit;
  const [query] = useSearchParams();
  const navigate = useNavigate();
  const [isPassing, setPassing] = useState(false);
  /** Goes elsewhere without a question about what is not saved. */
  const pass = async (to: string, options: NavigateOptions = {}) => {
    flushSync(() => setPassing(true));
    await navigate(to, options);
    setPassing(false);
  };
  const saving = useSaving(edit, pass);
  const canSave =
    (base === undefined || isDirty) && draft.title.trim() !== "" && draft.content !== "" && !saving.isBusy;
  useHotkeys([["mod+S", () => canSave && saving.save()]], []);

  const pick = (version: Draft) => {
    const put = async () => set(draftOf(version));
    if (!isDirty) void put();
    else
      confirm(
        "Replace what is in the editor?",
        "What you changed since the last save is lost.",
        "Replace it",
        put,
      );
  };
  return (
    <Stack className={classes["page"] ?? ""} gap="md">
      <title>{`${base?.title ?? "New template"} · Prompt Portal`}</title>
      <LeaveGuard when={isDirty && !isPassing} onLeave={edit.forget} />
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
          {base && <MoreMenu id={base.id} onDeleted={() => pass("/templates")} />}
        </Group>
      </Group>
      {saving.error && <SaveError saving={saving} edit={edit} />}
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

type Edit = ReturnType<typeof useEdit>;

function useSaving(
  { draft, base, rebase }: Edit,
  pass: (to: string, options: NavigateOptions) => Promise<void>,
) {
  const { mutateAsync: create } = useCreateTemplate();
  const { mutateAsync: update } = useSaveTemplate(base?.id ?? "");
  const newest = useTemplate(base?.id ?? "new", base !== undefined);
  const [error, setError] = useState<PortalError>();
  const [isBusy, setBusy] = useState(false);

  const save = async (basedOn = base?.version) => {
    setBusy(true);
    setError(undefined);
    try {
      if (base === undefined) {
        const made = await create(draft);
        rebase(made);
        await pass(`/templates/${made.id}`, { replace: true, state: { editor: "new" } satisfies FirstSave });
      } else {
        rebase(await update({ ...draft, based_on: basedOn ?? base.version }));
      }
    } catch (thrown) {
      const failure = PortalError.from(thrown);
      if (failure.code === "conflict") await newest.refetch();
      setError(failure);
    }
    setBusy(false);
  };
  return { save, error, setError, isBusy, newest };
}

function SaveError({ saving, edit }: { saving: ReturnType<typeof useSaving>; edit: Edit }) {
  const { error, newest, save, setError } = saving;
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
            edit.rebase(theirs);
            edit.set(draftOf(theirs));
            setError(undefined);
          }}
        >
          Take theirs and drop mine
        </Button>
      </Group>
    </Stack>
  );
}

function MoreMenu({ id, onDeleted }: { id: string; onDeleted: () => Promise<void> }) {
  const { mutateAsync: deleteTemplate } = useDeleteTemplate();
  const { mutateAsync: restoreTemplate } = useRestoreTemplate();
  const remove = () =>
    deleteTemplate(id)
      .then(() => {
        void onDeleted();
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
