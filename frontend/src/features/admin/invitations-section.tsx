import { Button, Group, NativeSelect, NumberInput, Text } from "@mantine/core";
import { useForm } from "@mantine/form";
import { PortalError } from "../../client/errors";
import type { Invitation } from "../../client/schema";
import { Ago } from "../../components/ago";
import { ErrorNotice } from "../../components/error-notice";
import { Loaded } from "../../components/loaded";
import { notifyError } from "../../components/notify";
import { Section } from "../../components/section";
import { useMay } from "../../queries/access";
import { useInvitations, useInvite, useRoles, useTakeInvitationBack } from "../../queries/admin";
import { OwnerName } from "./owner-name";

const LONGEST_DAYS = 365;

/** Inviting people, and the invitations that can still be used. */
export function InvitationsSection({ onLink }: { onLink: (link: string) => void }) {
  const may = useMay();
  const invitations = useInvitations();
  return (
    <Section title="Invitations">
      {may("users:write") && <InviteForm onLink={onLink} />}
      <Loaded query={invitations} label="the invitations">
        {(data) =>
          data.length === 0 ? (
            <Text size="sm" c="dimmed">
              No invitation is open.
            </Text>
          ) : (
            data.map((one) => (
              <InvitationRow key={one.id} invitation={one} canTakeBack={may("users:write")} />
            ))
          )
        }
      </Loaded>
    </Section>
  );
}

function InviteForm({ onLink }: { onLink: (link: string) => void }) {
  const { data: roles } = useRoles();
  const invite = useInvite();
  const form = useForm({ initialValues: { role: "author", days: 7 } });
  const submit = form.onSubmit((values) =>
    invite.mutate(values, { onSuccess: ({ path }) => onLink(window.location.origin + path) }),
  );
  return (
    <form onSubmit={submit}>
      <Group align="flex-end" gap="sm">
        <NativeSelect
          label="Role"
          data={roles?.map((role) => role.name) ?? ["author"]}
          {...form.getInputProps("role")}
        />
        <NumberInput
          label="Days"
          min={1}
          max={LONGEST_DAYS}
          allowDecimal={false}
          w={90}
          {...form.getInputProps("days")}
        />
        <Button type="submit" loading={invite.isPending}>
          Invite
        </Button>
      </Group>
      {invite.error && <ErrorNotice error={PortalError.from(invite.error)} />}
    </form>
  );
}

function InvitationRow({ invitation, canTakeBack }: { invitation: Invitation; canTakeBack: boolean }) {
  const takeBack = useTakeInvitationBack();
  return (
    <Group justify="space-between" wrap="nowrap">
      <Text size="sm">
        For the role {invitation.role}, by <OwnerName owner={invitation.made_by} />,{" "}
        <Ago time={invitation.created_at} />; good until {new Date(invitation.expires_at).toLocaleString()}
      </Text>
      {canTakeBack && (
        <Button
          size="xs"
          variant="default"
          flex="none"
          loading={takeBack.isPending}
          onClick={() => takeBack.mutate(invitation.id, { onError: notifyError })}
        >
          Take back
        </Button>
      )}
    </Group>
  );
}
