/** The admin's pages, with the permission that each needs. */
export const PAGES = [
  { to: "/admin/users", label: "Users", permission: "users:read" },
  { to: "/admin/roles", label: "Roles", permission: "users:read" },
  { to: "/admin/limits", label: "Limits", permission: "usage:read-all" },
  { to: "/admin/devices", label: "Devices", permission: "devices:read" },
  { to: "/admin/usage", label: "Usage", permission: "usage:read-all" },
  { to: "/admin/audit", label: "Audit", permission: "audit:read" },
];
