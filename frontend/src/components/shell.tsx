import { AppShell, Burger, Group, NavLink, ScrollArea, Text } from "@mantine/core";
import { useDisclosure, useHotkeys } from "@mantine/hooks";
import { IconMessagePlus, IconShield, IconTemplate } from "@tabler/icons-react";
import { type MouseEvent, type ReactNode, useEffect, useRef } from "react";
import { Link, Outlet, ScrollRestoration, useLocation } from "react-router";
import { PortalError } from "../client/errors";
import { useMay, usePermissions } from "../queries/access";
import { AccountMenu } from "./account-menu";
import { ErrorNotice } from "./error-notice";
import { isInPopup } from "./focus-return";
import { ModelStatus } from "./model-status";
import classes from "./shell.module.css";

const PAGES = [
  {
    to: "/chat",
    label: "New chat",
    icon: IconMessagePlus,
    isActive: (path: string) => path === "/chat",
    permissions: ["chat:use"],
  },
  {
    to: "/templates",
    label: "Templates",
    icon: IconTemplate,
    isActive: (path: string) => path.startsWith("/templates"),
    permissions: ["templates:read"],
  },
  {
    to: "/admin",
    label: "Admin",
    icon: IconShield,
    isActive: (path: string) => path.startsWith("/admin"),
    permissions: ["users:read", "usage:read-all", "audit:read", "devices:read"],
  },
];

/** The frame of every page: where one can go, and how the model is. `sidebar` is below the pages. */
export function Shell({ sidebar }: { sidebar: ReactNode }) {
  const [opened, { toggle, close }] = useDisclosure();
  const { pathname } = useLocation();
  const permissions = usePermissions();
  const may = useMay();
  const burger = useRef<HTMLButtonElement>(null);

  // On a phone the menu covers the page that was chosen in it.
  // biome-ignore lint/correctness/useExhaustiveDependencies: it closes whenever the address changes
  useEffect(close, [pathname]);

  const dismiss = () => {
    close();
    burger.current?.focus();
  };
  useHotkeys(
    [["Escape", (event) => opened && !isInPopup(event.target) && dismiss(), { preventDefault: false }]],
    [],
  );

  return (
    <AppShell
      layout="alt"
      header={{ height: { base: 52, sm: 0 } }}
      navbar={{ width: 272, breakpoint: "sm", collapsed: { mobile: !opened } }}
    >
      {/* biome-ignore lint/a11y/useValidAnchor: it does lead there; the handler only hastens the focus */}
      <a href="#main" className={classes["skip"]} onClick={skip}>
        Skip to the content
      </a>
      <AppShell.Header hiddenFrom="sm">
        <Group h="100%" px="sm" gap="xs">
          <Burger
            ref={burger}
            opened={opened}
            onClick={toggle}
            size="sm"
            aria-label="Menu"
            aria-expanded={opened}
          />
          <Brand />
        </Group>
      </AppShell.Header>
      <AppShell.Navbar className={classes["navbar"]} aria-label="Portal" data-opened={opened || undefined}>
        <AppShell.Section p="sm" pb={4}>
          <Group justify="space-between">
            <Brand />
            <Burger opened={opened} onClick={dismiss} hiddenFrom="sm" size="sm" aria-label="Close the menu" />
          </Group>
        </AppShell.Section>
        <AppShell.Section px="xs">
          {permissions.isLoadingError && (
            <ErrorNotice
              error={PortalError.from(permissions.error)}
              onRetry={() => void permissions.refetch()}
            />
          )}
          {PAGES.filter(({ permissions }) => permissions.some(may)).map(
            ({ to, label, icon: Icon, isActive }) => (
              <NavLink
                key={to}
                component={Link}
                to={to}
                label={label}
                active={isActive(pathname)}
                aria-current={isActive(pathname) ? "page" : undefined}
                leftSection={<Icon size={18} aria-hidden />}
                className={classes["link"] ?? ""}
                onClick={close}
              />
            ),
          )}
        </AppShell.Section>
        <AppShell.Section grow component={ScrollArea} type="auto" px="xs" pt="xs">
          {sidebar}
        </AppShell.Section>
        <AppShell.Section p="xs" className={classes["foot"]}>
          <ModelStatus />
          <AccountMenu />
        </AppShell.Section>
      </AppShell.Navbar>
      <AppShell.Main id="main" tabIndex={-1} className={classes["main"]} data-covered={opened || undefined}>
        <Outlet />
        <ScrollRestoration />
      </AppShell.Main>
    </AppShell>
  );
}

// Chromium moves the focus only at its next frame when it follows the address by itself.
function skip(event: MouseEvent) {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function Brand() {
  return (
    <Group gap={8} wrap="nowrap">
      <img src="/icon.svg" alt="" width={24} height={24} />
      <Text fw={650}>Prompt Portal</Text>
    </Group>
  );
}
