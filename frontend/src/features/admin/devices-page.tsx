import { Badge, Button, Menu, Table, Text } from "@mantine/core";
import { useDisclosure } from "@mantine/hooks";
import { IconDots } from "@tabler/icons-react";
import { useState } from "react";
import type { Device, DeviceList } from "../../client/schema";
import { Ago } from "../../components/ago";
import { confirm } from "../../components/confirm";
import { FormModal } from "../../components/form-modal";
import { Loaded } from "../../components/loaded";
import { Section } from "../../components/section";
import { ShownOnce } from "../../components/shown-once";
import { WideTable } from "../../components/wide-table";
import { useMay } from "../../queries/access";
import { useAddDevice, useDevicePassword, useDevices, useRemoveDevice } from "../../queries/devices";
import classes from "./admin.module.css";
import { DeviceForm } from "./device-form";

type Keeper = DeviceList["acl"];

interface Shown {
  name: string;
  password: string;
}

export function DevicesPage() {
  const canWrite = useMay()("devices:write");
  const devices = useDevices();
  const add = useAddDevice();
  const [adding, { open, close }] = useDisclosure();
  const [shown, setShown] = useState<Shown>();
  const canAdd = canWrite && devices.data !== undefined && devices.data.acl !== "none";
  return (
    <Section
      title="Devices"
      aside={
        canAdd && (
          <Button size="xs" onClick={open}>
            New device
          </Button>
        )
      }
    >
      <title>Devices · Prompt Portal</title>
      <Text size="sm" c="dimmed">
        A device signs in at the MQTT broker with a password of its own, reaches its own topics and no others,
        and asks in its owner's name.
      </Text>
      <Loaded query={devices} label="the devices">
        {(data) => (
          <>
            {data.acl === "none" && (
              <Text size="sm">
                There can be none here, since nobody would keep them to their own topics. The setting{" "}
                <code>MQTT_ACL</code> says who does.
              </Text>
            )}
            {data.acl !== "none" && data.devices.length === 0 && <Text size="sm">There are none yet.</Text>}
            {data.devices.length > 0 && <DeviceTable {...data} canWrite={canWrite} onPassword={setShown} />}
            <FormModal opened={adding} onClose={close} action={add} title="New device">
              <DeviceForm
                projects={data.projects}
                add={add}
                onAdded={({ name, password }) => {
                  close();
                  if (password !== null) setShown({ name, password });
                }}
              />
            </FormModal>
          </>
        )}
      </Loaded>
      <ShownOnce
        title={`The password of ${shown?.name ?? ""}`}
        secret={shown?.password}
        onClose={() => setShown(undefined)}
      >
        At the broker its user name is <code>{shown?.name}</code>. Only the broker knows the password.
      </ShownOnce>
    </Section>
  );
}

interface TableProps {
  devices: Device[];
  acl: Keeper;
  canWrite: boolean;
  onPassword: (shown: Shown) => void;
}

function DeviceTable({ devices, ...rest }: TableProps) {
  return (
    <WideTable label="Devices" minWidth={700}>
      <Table.Thead>
        <Table.Tr>
          <Table.Th>Name</Table.Th>
          <Table.Th>Owner</Table.Th>
          <Table.Th>Projects</Table.Th>
          <Table.Th>At the broker</Table.Th>
          <Table.Th>Added</Table.Th>
          <Table.Th aria-label="Actions" />
        </Table.Tr>
      </Table.Thead>
      <Table.Tbody>
        {devices.map((device) => (
          <DeviceRow key={device.id} device={device} {...rest} />
        ))}
      </Table.Tbody>
    </WideTable>
  );
}

function DeviceRow({ device, acl, canWrite, onPassword }: Omit<TableProps, "devices"> & { device: Device }) {
  return (
    <Table.Tr>
      <Table.Td className={classes["name"] ?? ""}>
        <Text fw={600}>{device.name}</Text>
      </Table.Td>
      <Table.Td>{device.owner}</Table.Td>
      <Table.Td>{device.projects.join(", ")}</Table.Td>
      <Table.Td>
        <AtBroker device={device} acl={acl} />
      </Table.Td>
      <Table.Td>
        <Ago time={device.created_at} />
      </Table.Td>
      <Table.Td>{canWrite && <DeviceMenu device={device} acl={acl} onPassword={onPassword} />}</Table.Td>
    </Table.Tr>
  );
}

/** Whether a device can sign in at the broker, as far as the portal knows. */
function AtBroker({ device, acl }: { device: Device; acl: Keeper }) {
  if (acl === "external") return "not the portal's";
  if (device.at_broker === null) return "the broker does not answer";
  if (device.at_broker) return "ready";
  return (
    <Badge color="orange" variant="light" tt="none" c="var(--mantine-color-text)">
      needs a new password
    </Badge>
  );
}

function DeviceMenu({
  device,
  acl,
  onPassword,
}: Omit<TableProps, "devices" | "canWrite"> & { device: Device }) {
  const { mutateAsync: makePassword } = useDevicePassword();
  const { mutateAsync: remove } = useRemoveDevice();
  const { name } = device;
  const askForPassword = () =>
    confirm(
      `Give ${name} a new password?`,
      "The one that it has is good no more, and its connections end.",
      "New password",
      async () => onPassword({ name, ...(await makePassword(name)) }),
    );
  const askToRemove = () =>
    confirm(
      `Remove ${name}?`,
      "Its connections end, and its password is good no more. Its sessions stay with its owner.",
      "Remove",
      () => remove(name),
    );
  return (
    <Menu position="bottom-end" shadow="md">
      <Menu.Target>
        <Button size="xs" variant="subtle" color="gray" aria-label={`Actions for ${name}`}>
          <IconDots size={16} aria-hidden />
        </Button>
      </Menu.Target>
      <Menu.Dropdown>
        {acl === "mosquitto" && <Menu.Item onClick={askForPassword}>New password</Menu.Item>}
        <Menu.Item color="red" onClick={askToRemove}>
          Remove
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}
