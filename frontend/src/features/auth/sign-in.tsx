import { Anchor, Button, Center, Paper, PasswordInput, Stack, Text, TextInput, Title } from "@mantine/core";
import { useForm } from "@mantine/form";
import { type ReactNode, useState, useSyncExternalStore } from "react";
import { Link, Navigate, useLocation } from "react-router";
import { authStore, signIn } from "../../client/auth";
import { PortalError } from "../../client/errors";
import { body, http } from "../../client/http";
import { ErrorNotice } from "../../components/error-notice";
import { NewPasswordInput, passwordFault } from "../../components/new-password-input";
import { useLinkSecret } from "./one-use-link";

const SIGN_IN = { to: "/sign-in", label: "Sign in" };

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
export function RegisterPage() {
  return <NewAccount title="Make an account" />;
}

/** Where an invitation leads to. */
export function JoinPage() {
  const { secret, forget } = useLinkSecret();
  if (secret === "") return <Incomplete />;
  return <NewAccount title="You are invited" invitation={secret} onMade={forget} />;
}

interface NewAccountProps {
  title: string;
  invitation?: string;
  onMade?: () => void;
}

function NewAccount({ title, invitation, onMade }: NewAccountProps) {
  const form = useForm({
    initialValues: { username: "", email: "", password: "" },
    validate: { username, password: passwordFault },
  });
  const register = async (values: typeof form.values) => {
    await body(http.POST("/api/auth/register", { body: { ...values, invitation: invitation ?? null } }));
    onMade?.();
    await signIn({ username: values.username, password: values.password });
  };
  return (
    <AccountForm
      title={title}
      submit="Make the account"
      onSubmit={(run) => form.onSubmit((values) => run(() => register(values)))}
      other="You have one? "
      otherLink={SIGN_IN}
    >
      <TextInput
        label="Username"
        autoComplete="username"
        required
        autoFocus
        {...form.getInputProps("username")}
      />
      <TextInput label="Email" type="email" autoComplete="email" required {...form.getInputProps("email")} />
      <NewPasswordInput label="Password" {...form.getInputProps("password")} />
    </AccountForm>
  );
}

/** Where an admin's link leads to with which a password is set anew. */
export function NewPasswordPage() {
  const { secret, forget } = useLinkSecret();
  const [isDone, setDone] = useState(false);
  const form = useForm({ initialValues: { password: "" }, validate: { password: passwordFault } });
  const reset = async (values: typeof form.values) => {
    await body(
      http.POST("/api/auth/password-reset", { body: { link: secret, new_password: values.password } }),
    );
    forget();
    setDone(true);
  };
  if (isDone) return <Navigate to="/sign-in" replace />;
  if (secret === "") return <Incomplete />;
  return (
    <AccountForm
      title="Set a new password"
      submit="Set the password"
      onSubmit={(run) => form.onSubmit((values) => run(() => reset(values)))}
      other="You know it again? "
      otherLink={SIGN_IN}
    >
      <NewPasswordInput label="New password" autoFocus {...form.getInputProps("password")} />
    </AccountForm>
  );
}

/** In the place of a form that is of no use without the secret of its link. */
function Incomplete() {
  return (
    <Frame title="This link is incomplete" state={null} other="You have an account? " otherLink={SIGN_IN}>
      <Text size="sm">
        Its last part is missing, which begins with #. Open it as a whole, or ask for another one: each is
        good once.
      </Text>
    </Frame>
  );
}

interface FrameProps {
  title: string;
  other: ReactNode;
  otherLink: { to: string; label: string };
  /** Goes along with the other link. */
  state: unknown;
  children: ReactNode;
}

interface Props extends Omit<FrameProps, "state"> {
  submit: string;
  onSubmit: (
    run: (action: () => Promise<void>) => Promise<void>,
  ) => (event?: React.FormEvent<HTMLFormElement>) => void;
}

/** The frame of all forms. Signed in, it goes on to where the person was going. */
function AccountForm({ submit, onSubmit, children, ...frame }: Props) {
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
    <form onSubmit={onSubmit(run)}>
      <Frame {...frame} state={location.state}>
        {error && <ErrorNotice error={error} />}
        {children}
        <Button type="submit" loading={busy}>
          {submit}
        </Button>
      </Frame>
    </form>
  );
}

function Frame({ title, other, otherLink, state, children }: FrameProps) {
  return (
    <Center component="main" mih="100dvh" p="md">
      <title>{`${title} · Prompt Portal`}</title>
      <Paper w="100%" maw={400} p={{ base: "md", xs: "xl" }} withBorder radius="lg">
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
          {children}
          <Text size="sm" ta="center">
            {other}
            <Anchor component={Link} to={otherLink.to} state={state} inherit underline="always">
              {otherLink.label}
            </Anchor>
          </Text>
        </Stack>
      </Paper>
    </Center>
  );
}
