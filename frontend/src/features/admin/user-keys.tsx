import { Modal, Stack, Text } from "@mantine/core";
import type { User } from "../../client/schema";
import { confirm } from "../../components/confirm";
import { KeyLine } from "../../components/key-line";
import { Loaded } from "../../components/loaded";
import { useRevokeUserKey, useUserKeys } from "../../queries/admin";

/** The API keys of somebody, in a dialog. */
export function UserKeys({ user, onClose }: { user: User | undefined; onClose: () => void }) {
  return (
    <Modal
      opened={user !== undefined}
      onClose={onClose}
      title={`API keys of ${user?.username ?? ""}`}
      size="lg"
    >
      {user && <Keys user={user.id} />}
    </Modal>
  );
}

function Keys({ user }: { user: string }) {
  const keys = useUserKeys(user);
  const { mutateAsync: revoke } = useRevokeUserKey(user);
  return (
    <Loaded query={keys} label="the keys">
      {(data) => (
        <Stack>
          {data.length === 0 && <Text>There are none.</Text>}
          {data.map((key) => (
            <KeyLine
              key={key.id}
              apiKey={key}
              onRevoke={() =>
                confirm(
                  `Revoke “${key.name}”?`,
                  "Programs that use it are refused from then on.",
                  "Revoke",
                  () => revoke(key.id),
                )
              }
            />
          ))}
        </Stack>
      )}
    </Loaded>
  );
}
