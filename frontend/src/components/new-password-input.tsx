import { PasswordInput, type PasswordInputProps } from "@mantine/core";

const SHORTEST = 8;
const RULE = `At least ${SHORTEST} characters`;

/** What is wrong with a new password, if anything is. */
export function passwordFault(value: string): string | null {
  return value.length < SHORTEST ? RULE : null;
}

/** The box for a password that is made up, and not remembered. */
export function NewPasswordInput(props: PasswordInputProps) {
  return <PasswordInput description={RULE} autoComplete="new-password" required {...props} />;
}
