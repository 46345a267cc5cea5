import { Group, NavLink, Stack, Title } from "@mantine/core";
import { Link, Navigate, Outlet, useLocation } from "react-router";
import { Loaded } from "../../components/loaded";
import { useMay, usePermissions } from "../../queries/access";
import classes from "./admin.module.css";
import { PAGES } from "./pages";

/** The frame of the admin's pages: those of them that the person may see. */
export function AdminPage() {
  const permissions = usePermissions();
  const may = useMay();
  const { pathname } = useLocation();
  const pages = PAGES.filter((page) => may(page.permission));
  return (
    <Stack className={classes["page"] ?? ""} gap="md">
      <title>Admin · Prompt Portal</title>
      <Title order={1} size="h2">
        Admin
      </Title>
      <Loaded query={permissions} label="what you may">
        {() => (
          <>
            <Group component="nav" aria-label="Admin" gap={4}>
              {pages.map(({ to, label }) => (
                <NavLink
                  key={to}
                  component={Link}
                  to={to}
                  label={label}
                  active={pathname === to}
                  aria-current={pathname === to ? "page" : undefined}
                  w="auto"
                  className={classes["tab"] ?? ""}
                />
              ))}
            </Group>
            <Outlet />
          </>
        )}
      </Loaded>
    </Stack>
  );
}

/** Sends to the first page that the person may see. */
export function FirstAdminPage() {
  const may = useMay();
  const first = PAGES.find((page) => may(page.permission));
  return <Navigate to={first?.to ?? "/chat"} replace />;
}
