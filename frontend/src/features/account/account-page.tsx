import { Badge, Button, Group, PasswordInput, Stack, Text, Title } from "@mantine/core";
import { useForm } from "@mantine/form";
import { PortalError } from "../../client/errors";
import type { SignInBody } from "../../client/schema";
import { Ago } from "../../components/ago";
import { ErrorNotice } from "../../components/error-notice";
import { Loaded } from "../../components/loaded";
import { NewPasswordInput, passwordFault } from "../../components/new-password-input";
import { notifyError } from "../../components/notify";
import { Section } from "../../components/section";
import { useMay } from "../../queries/access";
import { useAccount, useChangePassword, useEndSignIn, useSignIns } from "../../queries/account";
import classes from "./account.module.css";
import { deviceOf } from "./device";
import { KeysCard } from "./keys-card";
import { UsageCard } from "./usage-card";

/** Who I am, what I have used, my keys, my password, and where I am signed in. */
export function AccountPage() {
  const { data: account } = useAccount();
  const may = useMay();
  return (
    <Stack className={classes["page"] ?? ""} gap="lg">
      <title>Account · Prompt Portal</title>
      <div>
        <Title order={1} size="h2">
          Account
        </Title>
        <Text c="dimmed">
          {account?.username} · {account?.email}
          {account && ` · ${account.role}`}
        </Text>
      </div>
      {may("usage:read") && <UsageCard />}
      {may("keys:write") && <KeysCard />}
      {may("account:write") && (
        <>
          <PasswordCard />
          <SignInsCard />
        </>
      )}
    </Stack>
  );
}

function PasswordCard() {
  const change = useChangePassword();
  const form = useForm({
    initialValues: { current_password: "", new_password: "" },
    validate: { new_password: passwordFault },
  });
  const submit = form.onSubmit((values) => change.mutate(values, { onSuccess: () => form.reset() }));
  return (
    <Section title="Password">
      <form onSubmit={submit}>
        <Stack maw={420} gap="sm">
          <PasswordInput
            label="Current password"
            autoComplete="current-password"
            required
            {...form.getInputProps("current_password")}
          />
          <NewPasswordInput label="New password" {...form.getInputProps("new_password")} />
          {change.error && <ErrorNotice error={PortalError.from(change.error)} />}
          {change.isSuccess && (
            <Text size="sm" role="status">
              It is changed. Wherever else you were signed in, you are no longer.
            </Text>
          )}
          <Button type="submit" loading={change.isPending} style={{ alignSelf: "flex-start" }}>
            Change the password
          </Button>
        </Stack>
      </form>
    </Section>
  );
}

function SignInsCard() {
  const signIns = useSignIns();
  const end = useEndSignIn();
  return (
    <Section
      title="Signed in on"
      aside={
        <Button
          size="xs"
          variant="default"
          onClick={() => end.mutate(undefined, { onError: notifyError })}
          loading={end.isPending && end.variables === undefined}
        >
          Sign out everywhere
        </Button>
      }
    >
      <Loaded query={signIns} label="the sign-ins">
        {(data) =>
          data.map((signIn) => (
            <SignInRow
              key={signIn.id}
              signIn={signIn}
              isEnding={end.isPending && end.variables === signIn.id}
              onEnd={() => end.mutate(signIn.id, { onError: notifyError })}
            />
          ))
        }
      </Loaded>
    </Section>
  );
}

function SignInRow({
  signIn,
  isEnding,
  onEnd,
}: {
  signIn: SignInBody;
  isEnding: boolean;
  onEnd: () => void;
}) {
  const device = deviceOf(signIn.user_agent);
  return (
    <Group justify="space-between" wrap="nowrap">
      <div>
        <Group gap="xs">
          <Text title={signIn.user_agent}>{device}</Text>
          {signIn.current && (
            <Badge variant="light" tt="none">
              here
            </Badge>
          )}
        </Group>
        <Text size="sm" c="dimmed">
          <Ago time={signIn.created_at} prefix="since " />,{" "}
          <Ago time={signIn.last_used_at} prefix="last used " />
        </Text>
      </div>
      {!signIn.current && (
        <Button
          size="xs"
          variant="default"
          flex="none"
          loading={isEnding}
          onClick={onEnd}
          aria-label={`Sign out on ${device}`}
        >
          Sign out
        </Button>
      )}
    </Group>
  );
}
