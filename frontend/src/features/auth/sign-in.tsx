import {
  Anchor,
  Button,
  Center,
  Paper,
  PasswordInput,
  type PasswordInputProps,
  Stack,
  Text,
  TextInput,
  Title,
} from "@mantine/core";
import { useForm } from "@mantine/form";
import { type ReactNode, useState, useSyncExternalStore } from "react";
import { Link, Navigate, useLocation } from "react-router";
import { authStore, signIn } from "../../client/auth";
import { PortalError } from "../../client/errors";
import { body, http } from "../../client/http";
import { ErrorNotice } from "../../components/error-notice";
import { useLinkSecret } from "./one-use-link";

const SHORTEST_PASSWORD = 8;

export function SignInPage() {
  const form = useForm({ initialValues: { username: "", password: "" } });
  return (
    <AccountForm
      title="Sign in"
      submit="Sign in"
      onSubmit={(run) => form.onSubmit((values) => run(() => signIn(values)))}
      other={<>New here? </>}
      otherLink={{ to: "/register", label: "Make an account" }}
    >
      <TextInput
        label="Username or email"
        autoComplete="username"
        required
        autoFocus
        {...form.getInputProps("username")}
      />
      <PasswordInput
        label="Password"
        autoComplete="current-password"
        required
        {...form.getInputProps("password")}
      />
    </AccountForm>
  );
}

const username = (value: string) =>
  /^[A-Za-z0-9_.-]{2,64}$/.test(value) ? null : "2 to 64 letters, digits, dots, dashes or underscores";
const password = (value: string) =>
  value.length < SHORTEST_PASSWORD ? `At least ${SHORTEST_PASSWORD} characters` : null;

export function RegisterPage() {
  return <NewAccount title="Make an account" />;
}

/** Where an invitation leads to. */
export function JoinPage() {
  const invitation = useLinkSecret();
  return <NewAccount title="You are invited" invitation={invitation} />;
}

function NewAccount({ title, invitation }: { title: string; invitation?: string }) {
  const form = useForm({
    initialValues: { username: "", email: "", password: "" },
    validate: { username, password },
  });
  const register = async (values: typeof form.values) => {
    await body(http.POST("/api/auth/register", { body: { ...values, invitation: invitation || null } }));
    await signIn({ username: values.username, password: values.password });
  };
  return (
    <AccountForm
      title={title}
      submit="Make the account"
      onSubmit={(run) => form.onSubmit((values) => run(() => register(values)))}
      other="You have one? "
      otherLink={{ to: "/sign-in", label: "Sign in" }}
    >
      <TextInput
        label="Username"
        autoComplete="username"
        required
        autoFocus
        {...form.getInputProps("username")}
      />
      <TextInput label="Email" type="email" autoComplete="email" required {...form.getInputProps("email")} />
      <NewPassword label="Password" {...form.getInputProps("password")} />
    </AccountForm>
  );
}

/** Where an admin's link leads to with which a password is set anew. */
export function NewPasswordPage() {
  const link = useLinkSecret();
  const [isDone, setDone] = useState(false);
  const form = useForm({ initialValues: { password: "" }, validate: { password } });
  const reset = async (values: typeof form.values) => {
    await body(http.POST("/api/auth/password-reset", { body: { link, new_password: values.password } }));
    setDone(true);
  };
  if (isDone) return <Navigate to="/sign-in" replace />;
  return (
    <AccountForm
      title="Set a new password"
      submit="Set the password"
      onSubmit={(run) => form.onSubmit((values) => run(() => reset(values)))}
      other="You know it again? "
      otherLink={{ to: "/sign-in", label: "Sign in" }}
    >
      <NewPassword label="New password" autoFocus {...form.getInputProps("password")} />
    </AccountForm>
  );
}

function NewPassword(props: PasswordInputProps) {
  return (
    <PasswordInput
      description={`At least ${SHORTEST_PASSWORD} characters`}
      autoComplete="new-password"
      required
      {...props}
    />
  );
}

interface Props {
  title: string;
  submit: string;
  onSubmit: (
    run: (action: () => Promise<void>) => Promise<void>,
  ) => (event?: React.FormEvent<HTMLFormElement>) => void;
  other: ReactNode;
  otherLink: { to: string; label: string };
  children: ReactNode;
}

/** The frame of both forms. Signed in, it goes on to where the person was going. */
function AccountForm({ title, submit, onSubmit, other, otherLink, children }: Props) {
  const status = useSyncExternalStore(authStore.subscribe, authStore.snapshot);
  const location = useLocation();
  const [error, setError] = useState<PortalError>();
  const [busy, setBusy] = useState(false);

  if (status === "in") {
    const from = (location.state as { from?: { pathname: string; search: string } } | null)?.from;
    return <Navigate to={from ?? "/chat"} replace />;
  }
  const run = async (action: () => Promise<void>) => {
    setBusy(true);
    setError(undefined);
    await action().catch((thrown: unknown) => setError(PortalError.from(thrown)));
    setBusy(false);
  };
  return (
    <Center component="main" mih="100dvh" p="md">
      <title>{`${title} · Prompt Portal`}</title>
      <Paper w="100%" maw={400} p={{ base: "md", xs: "xl" }} withBorder radius="lg">
        <form onSubmit={onSubmit(run)}>
          <Stack>
            <Stack gap={4} align="center">
              <img src="/icon.svg" alt="" width={40} height={40} />
              <Title order={1} size="h3">
                {title}
              </Title>
              <Text size="sm" c="dimmed">
                Prompt Portal
              </Text>
            </Stack>
            {error && <ErrorNotice error={error} />}
            {children}
            <Button type="submit" loading={busy}>
              {submit}
            </Button>
            <Text size="sm" ta="center">
              {other}
              <Anchor component={Link} to={otherLink.to} state={location.state} inherit underline="always">
                {otherLink.label}
              </Anchor>
            </Text>
          </Stack>
        </form>
      </Paper>
    </Center>
  );
}
