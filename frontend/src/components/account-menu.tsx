import {
  Avatar,
  Group,
  Menu,
  Text,
  UnstyledButton,
  useMantineColorScheme,
  VisuallyHidden,
} from "@mantine/core";
import {
  IconBook,
  IconDeviceDesktop,
  IconLogout,
  IconMoon,
  IconSelector,
  IconSun,
  IconUser,
} from "@tabler/icons-react";
import { Link } from "react-router";
import { signOut } from "../client/auth";
import { useAccount } from "../queries/account";
import classes from "./account-menu.module.css";
import { confirm } from "./confirm";
import { notifyError } from "./notify";
import { unsaved } from "./unsaved";

const SCHEMES = [
  { value: "light", label: "Light", icon: IconSun },
  { value: "dark", label: "Dark", icon: IconMoon },
  { value: "auto", label: "As the system", icon: IconDeviceDesktop },
] as const;

export function AccountMenu() {
  const { data: account } = useAccount();
  const { colorScheme, setColorScheme } = useMantineColorScheme();
  const name = account?.username ?? "";
  return (
    <Menu position="top-start" width={240} shadow="md">
      <Menu.Target>
        <UnstyledButton className={classes["button"] ?? ""}>
          <Group gap={8} wrap="nowrap">
            <Avatar size={28} color="portal" name={name} aria-hidden />
            <VisuallyHidden>Account of </VisuallyHidden>
            <Text size="sm" truncate flex={1}>
              {name}
            </Text>
            <IconSelector size={16} aria-hidden />
          </Group>
        </UnstyledButton>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Label>Colours</Menu.Label>
        {SCHEMES.map(({ value, label, icon: Icon }) => (
          <Menu.Item
            key={value}
            leftSection={<Icon size={16} aria-hidden />}
            rightSection={colorScheme === value ? "✓" : null}
            onClick={() => setColorScheme(value)}
          >
            {label}
          </Menu.Item>
        ))}
        <Menu.Divider />
        <Menu.Item component={Link} to="/account" leftSection={<IconUser size={16} aria-hidden />}>
          Account
        </Menu.Item>
        <Menu.Item
          component="a"
          href="/docs"
          target="_blank"
          leftSection={<IconBook size={16} aria-hidden />}
        >
          API
        </Menu.Item>
        <Menu.Item leftSection={<IconLogout size={16} aria-hidden />} onClick={askToSignOut}>
          Sign out
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}

function askToSignOut() {
  const leave = () => signOut().then(unsaved.removeAll);
  if (!unsaved.isShown()) leave().catch(notifyError);
  else
    confirm("Sign out without saving?", "What you changed since the last save is lost.", "Sign out", leave);
}
