import { Center } from "@mantine/core";
import { useLocation, useParams, useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import { ErrorNotice } from "../../components/error-notice";
import { NotFoundPage } from "../../components/error-pages";
import { Loading } from "../../components/loading";
import { useAccount } from "../../queries/account";
import { useTemplate } from "../../queries/templates";
import { BLANK, draftOf, EXAMPLE } from "./drafts";
import { type FirstSave, TemplateEditor } from "./template-editor";

/** A template, or a new one at `/templates/new`. */
export function TemplatePage() {
  const { templateId = "" } = useParams();
  const state = useLocation().state as FirstSave | null;
  return <EditorOf key={state?.editor ?? templateId} id={templateId} />;
}

function EditorOf({ id }: { id: string }) {
  const [query] = useSearchParams();
  const isNew = id === "new";
  const account = useAccount();
  const template = useTemplate(id, !isNew);
  if (account.data && (isNew || template.data)) {
    const blank = query.has("example") ? EXAMPLE : BLANK;
    const initial = template.data ? draftOf(template.data) : blank;
    return <TemplateEditor person={account.data.id} saved={template.data} initial={initial} />;
  }
  const failed = [account, template].find(({ error }) => error !== null);
  const failure = failed && PortalError.from(failed.error);
  if (failure?.code === "not_found") return <NotFoundPage />;
  return (
    <Center mih="60dvh" p="md">
      {failure ? (
        <ErrorNotice error={failure} onRetry={() => void failed?.refetch()} />
      ) : (
        <Loading label="Loading the template" />
      )}
    </Center>
  );
}
