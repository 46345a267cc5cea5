import { Badge, Button, Card, Group, SimpleGrid, Stack, Text, TextInput, Title } from "@mantine/core";
import { useDebouncedValue } from "@mantine/hooks";
import { IconPlus, IconSearch } from "@tabler/icons-react";
import { useState } from "react";
import { Link } from "react-router";
import type { Template } from "../../client/schema";
import { Ago } from "../../components/ago";
import { Loaded } from "../../components/loaded";
import { SEARCH_AFTER_MS } from "../../components/search";
import { useTemplates } from "../../queries/templates";
import classes from "./templates.module.css";

export function TemplatesPage() {
  const [search, setSearch] = useState("");
  const [wanted] = useDebouncedValue(search.trim(), SEARCH_AFTER_MS);
  const templates = useTemplates(wanted);
  return (
    <Stack className={classes["page"] ?? ""} gap="md">
      <title>Templates · Prompt Portal</title>
      <Group justify="space-between">
        <Title order={1} size="h2">
          Templates
        </Title>
        <Button component={Link} to="/templates/new" leftSection={<IconPlus size={16} aria-hidden />}>
          New template
        </Button>
      </Group>
      <Loaded query={templates} label="the templates">
        {({ templates: found, total }) =>
          total === 0 && wanted === "" ? (
            <Empty />
          ) : (
            <>
              <TextInput
                aria-label="Search templates"
                placeholder="Search in titles, descriptions and texts"
                leftSection={<IconSearch size={16} aria-hidden />}
                value={search}
                onChange={(event) => setSearch(event.currentTarget.value)}
              />
              {found.length === 0 && <Text c="dimmed">No template has “{wanted}” in it.</Text>}
              <SimpleGrid cols={{ base: 1, md: 2 }} spacing="sm">
                {found.map((template) => (
                  <TemplateCard key={template.id} template={template} />
                ))}
              </SimpleGrid>
              {total > found.length && (
                <Text size="sm" c="dimmed">
                  The latest {found.length} of {total}; search finds the others.
                </Text>
              )}
            </>
          )
        }
      </Loaded>
    </Stack>
  );
}

function TemplateCard({ template }: { template: Template }) {
  return (
    <Card withBorder component={Link} to={`/templates/${template.id}`} className={classes["card"] ?? ""}>
      <Stack gap={6} h="100%">
        <Group justify="space-between" wrap="nowrap" align="flex-start">
          <Text fw={600} lineClamp={2}>
            {template.title}
          </Text>
          <Badge variant="light" tt="none" flex="none">
            v{template.version}
          </Badge>
        </Group>
        <Text size="sm" c="dimmed" lineClamp={2}>
          {template.description || template.content}
        </Text>
        <Group gap={6} mt="auto">
          {template.variables.map((name) => (
            <Badge key={name} variant="default" size="sm" tt="none" fw={400}>
              {name}
            </Badge>
          ))}
          <Text size="xs" c="dimmed" ml="auto">
            saved <Ago time={template.saved_at} />
          </Text>
        </Group>
      </Stack>
    </Card>
  );
}

function Empty() {
  return (
    <Card withBorder p="xl">
      <Stack align="center" ta="center" gap="sm">
        <Title order={2} size="h4">
          A template is a prompt that you use again
        </Title>
        <Text c="dimmed" maw={520}>
          Write down once what the model is to be, with {"{{ variables }}"} for what changes. Each save is a
          version of its own, and every chat remembers which one it was made from.
        </Text>
        <Button component={Link} to="/templates/new?example" variant="default">
          Begin with an example
        </Button>
      </Stack>
    </Card>
  );
}
