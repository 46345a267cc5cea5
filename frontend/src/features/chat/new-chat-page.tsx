import { Anchor, Collapse, Stack, Text, Textarea, Title, UnstyledButton } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { useEffect, useRef, useState } from "react";
import { Link, useNavigate, useSearchParams } from "react-router";
import { PortalError } from "../../client/errors";
import { ErrorNotice } from "../../components/error-notice";
import { SearchSelect } from "../../components/search-select";
import { VariableInputs } from "../../components/variable-inputs";
import { useMay } from "../../queries/access";
import { useTemplate, useTemplates, type Variables } from "../../queries/templates";
import { Composer } from "./composer";
import classes from "./conversation.module.css";
import { drafts, useDraft } from "./drafts";
import { useLiveTurns } from "./use-live-turns";

const VARIABLES = "new:variables";
const SYSTEM_PROMPT = "new:system-prompt";

/** Where a chat begins: with a template, with a system prompt, or just so. */
export function NewChatPage() {
  const [query, setQuery] = useSearchParams();
  const templateId = query.get("template");
  const may = useMay();
  const mayUseTemplates = may("templates:read");
  const [wanted, setWanted] = useState("");
  const { data } = useTemplates(wanted, mayUseTemplates);
  // The chosen one may be beyond the end of the list.
  const chosen = useTemplate(templateId ?? "", templateId !== null);
  const template = chosen.data;
  const listed = data?.templates.filter(({ id }) => id !== template?.id) ?? [];
  const choices = (template ? [template, ...listed] : listed).map(({ id, title }) => ({
    value: id,
    label: title,
  }));
  const [values, setValues] = useDraft(VARIABLES);
  const variables: Variables = values === "" ? {} : JSON.parse(values);
  const [systemPrompt, setSystemPrompt] = useDraft(SYSTEM_PROMPT);
  const [opened, { toggle }] = useDisclosure(systemPrompt !== "");
  const turns = useLiveTurns();
  const navigate = useNavigate();
  const isHere = useIsHere();

  const send = async (message: string, requestId: string) => {
    if (templateId !== null && template === undefined) {
      throw new PortalError("invalid_request", "The template of this chat is not loaded.");
    }
    const missing = template?.variables.filter((name) => !variables[name]) ?? [];
    if (missing.length > 0) {
      throw new PortalError("invalid_request", `Fill in ${missing.join(", ")} first: the template needs it.`);
    }
    // Tried again, it is the same chat too.
    const sessionId = requestId;
    const told = systemPrompt.trim() === "" ? {} : { system_prompt: systemPrompt };
    const start = template === undefined ? told : { template_id: template.id, variables };
    await turns.send(sessionId, message, { ...start, request_id: requestId });
    drafts.clear(VARIABLES, values);
    drafts.clear(SYSTEM_PROMPT, systemPrompt);
    // Who has gone elsewhere meanwhile stays there.
    if (isHere.current) void navigate(`/chat/${sessionId}`);
  };

  return (
    <div className={classes["page"]}>
      <title>New chat · Prompt Portal</title>
      <Stack className={classes["messages"] ?? ""} gap="md" justify="center">
        <Title order={1} size="h2" ta="center">
          What is it about?
        </Title>
        {mayUseTemplates && (
          <SearchSelect
            label="Template"
            description={
              data?.total === 0 && wanted === "" ? (
                <>
                  There are none yet.{" "}
                  <Anchor component={Link} to="/templates/new" size="xs" underline="always">
                    Write the first one
                  </Anchor>
                </>
              ) : (
                "Its text tells the model what to be before you say a word."
              )
            }
            placeholder="None"
            clearable
            nothingFoundMessage="No template has that in it"
            data={choices}
            value={template?.id ?? null}
            onSearch={setWanted}
            onChange={(id) => setQuery(id === null ? {} : { template: id }, { replace: true })}
          />
        )}
        {template && (
          <VariableInputs
            names={template.variables}
            optional={template.optional}
            values={variables}
            onChange={(changed) => setValues(JSON.stringify(changed))}
          />
        )}
        {chosen.error && !template && (
          <MissingTemplate
            error={PortalError.from(chosen.error)}
            onRetry={chosen.refetch}
            onDoWithout={() => setQuery({}, { replace: true })}
          />
        )}
        {templateId === null && (
          <div>
            <UnstyledButton py={2} onClick={toggle} aria-expanded={opened}>
              <Text size="sm" c="dimmed" td="underline">
                Write a system prompt for this chat alone
              </Text>
            </UnstyledButton>
            <Collapse expanded={opened}>
              <Textarea
                mt="xs"
                aria-label="System prompt"
                placeholder="You are …"
                autosize
                minRows={3}
                maxRows={12}
                value={systemPrompt}
                onChange={(event) => setSystemPrompt(event.currentTarget.value)}
              />
            </Collapse>
          </div>
        )}
      </Stack>
      <div className={classes["foot"]}>
        <Composer draftKey="new" onSend={send} />
      </div>
    </div>
  );
}

/** Says that the template of a link could not be loaded; the chat is not begun without it unasked. */
function MissingTemplate({
  error,
  onRetry,
  onDoWithout,
}: {
  error: PortalError;
  onRetry: () => unknown;
  onDoWithout: () => void;
}) {
  return error.options.retryable ? (
    <ErrorNotice error={error} onRetry={onRetry} />
  ) : (
    <ErrorNotice error={error} onRetry={onDoWithout} retryLabel="Go on without it" />
  );
}

/** Whether the page is still looked at, for what comes to its end later. */
function useIsHere() {
  const isHere = useRef(false);
  useEffect(() => {
    isHere.current = true;
    return () => {
      isHere.current = false;
    };
  }, []);
  return isHere;
}
