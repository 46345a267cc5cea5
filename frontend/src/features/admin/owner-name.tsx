import { Text } from "@mantine/core";
import { useMay } from "../../queries/access";
import { useUsers } from "../../queries/admin";

const WORDS: Record<string, string> = { "": "nobody who is known", local: "the operator", all: "everybody" };

/** The owner that is called so in lists; what is no account's name is an owner already. */
export function useOwnerCalled(name: string | undefined): string | undefined {
  const may = useMay();
  const { data } = useUsers("", may("users:read"));
  const user = data?.users.find((one) => one.username === name);
  return user ? `user:${user.id}` : name;
}

/** An owner or a subject of limits, by the name of the account where it is one and is known. */
export function OwnerName({ owner }: { owner: string }) {
  const may = useMay();
  const { data } = useUsers("", may("users:read"));
  const [kind, id] = owner.split(":", 2);
  const user = kind === "user" ? data?.users.find((one) => one.id === id) : undefined;
  return (
    <Text span inherit title={owner} style={{ overflowWrap: "anywhere" }}>
      {user?.username ?? WORDS[owner] ?? owner}
    </Text>
  );
}
