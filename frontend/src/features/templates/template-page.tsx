import { Center } from "@mantine/core";
import { useParams, useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import { ErrorNotice } from "../../components/error-notice";
import { Loading } from "../../components/loading";
import { useTemplate } from "../../queries/templates";
import { BLANK, EXAMPLE } from "./drafts";
import { TemplateEditor } from "./template-editor";

/** A template, or a new one at `/templates/new`. */
export function TemplatePage() {
  const { templateId = "" } = useParams();
  const [query] = useSearchParams();
  if (templateId === "new") {
    return <TemplateEditor key="new" saved={undefined} initial={query.has("example") ? EXAMPLE : BLANK} />;
  }
  return <SavedTemplate key={templateId} id={templateId} />;
}

function SavedTemplate({ id }: { id: string }) {
  const { data, error, refetch } = useTemplate(id);
  if (data) return <TemplateEditor saved={data} initial={data} />;
  return (
    <Center mih="60dvh" p="md">
      {error ? (
        <ErrorNotice error={PortalError.from(error)} onRetry={() => void refetch()} />
      ) : (
        <Loading label="Loading the template" />
      )}
    </Center>
  );
}
