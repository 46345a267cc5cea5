import { Anchor, Collapse, Stack, Text, Textarea, Title, UnstyledButton } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { useState } from "react";
import { Link, useNavigate, useSearchParams } from "react-router";
import { newId } from "../../api";
import { PortalError } from "../../client/errors";
import { SearchSelect } from "../../components/search-select";
import { VariableInputs } from "../../components/variable-inputs";
import { useMay } from "../../queries/access";
import { useTemplate, useTemplates, type Variables } from "../../queries/templates";
import { Composer } from "./composer";
import classes from "./conversation.module.css";
import { useLiveTurns } from "./use-live-turns";

/** Where a chat begins: with a template, with a system prompt, or just so. */
export function NewChatPage() {
  const [query, setQuery] = useSearchParams();
  const templateId = query.get("template");
  const may = useMay();
  const mayUseTemplates = may("templates:read");
  const [wanted, setWanted] = useState("");
  const { data } = useTemplates(wanted, mayUseTemplates);
  // The chosen one may be beyond the end of the list.
  const { data: template } = useTemplate(templateId ?? "", templateId !== null);
  const listed = data?.templates.filter(({ id }) => id !== template?.id) ?? [];
  const choices = (template ? [template, ...listed] : listed).map(({ id, title }) => ({
    value: id,
    label: title,
  }));
  const [variables, setVariables] = useState<Variables>({});
  const [systemPrompt, setSystemPrompt] = useState("");
  const [opened, { toggle }] = useDisclosure();
  const turns = useLiveTurns();
  const navigate = useNavigate();

  const send = async (message: string) => {
    const missing = template?.variables.filter((name) => !variables[name]) ?? [];
    if (missing.length > 0) {
      throw new PortalError("invalid_request", `Fill in ${missing.join(", ")} first: the template needs it.`);
    }
    const sessionId = newId();
    const told = systemPrompt.trim() === "" ? {} : { system_prompt: systemPrompt };
    const start = template === undefined ? told : { template_id: template.id, variables };
    await turns.send(sessionId, message, start);
    void navigate(`/chat/${sessionId}`);
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
        {template ? (
          <VariableInputs names={template.variables} values={variables} onChange={setVariables} />
        ) : (
          <div>
            <UnstyledButton onClick={toggle} aria-expanded={opened}>
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
