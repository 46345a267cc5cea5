import { MantineProvider } from "@mantine/core";
import { ModalsProvider } from "@mantine/modals";
import { Notifications } from "@mantine/notifications";
import { QueryClient, QueryClientProvider } from "@tanstack/react-query";
import { createBrowserRouter, Navigate } from "react-router";
import { RouterProvider } from "react-router/dom";
import classes from "./app.module.css";
import { PortalError } from "./client/errors";
import { NotFoundPage, RouteError } from "./components/error-pages";
import { RequireSignIn } from "./components/require-sign-in";
import { Shell } from "./components/shell";
import { AccountPage } from "./features/account/account-page";
import { AdminPage, FirstAdminPage } from "./features/admin/admin-page";
import { AuditPage } from "./features/admin/audit-page";
import { DevicesPage } from "./features/admin/devices-page";
import { LimitsPage } from "./features/admin/limits-page";
import { RolesPage } from "./features/admin/roles-page";
import { UsagePage } from "./features/admin/usage-page";
import { UsersPage } from "./features/admin/users-page";
import { JoinPage, NewPasswordPage, RegisterPage, SignInPage } from "./features/auth/sign-in";
import { ConversationPage } from "./features/chat/conversation-page";
import { NewChatPage } from "./features/chat/new-chat-page";
import { SessionList } from "./features/chat/session-list";
import { TemplatePage } from "./features/templates/template-page";
import { TemplatesPage } from "./features/templates/templates-page";
import { theme, variables } from "./theme";

const MAX_RETRIES = 2;

const queries = new QueryClient({
  defaultOptions: {
    queries: {
      retry: (failures, error) =>
        failures < MAX_RETRIES && error instanceof PortalError && error.options.retryable === true,
      staleTime: 5_000,
      // A portal on this machine or in the house is there when the browser says that it is offline.
      networkMode: "always",
      refetchOnReconnect: true,
    },
    mutations: { networkMode: "always" },
  },
});

const router = createBrowserRouter([
  { path: "/sign-in", element: <SignInPage />, errorElement: <RouteError /> },
  { path: "/register", element: <RegisterPage />, errorElement: <RouteError /> },
  { path: "/join", element: <JoinPage />, errorElement: <RouteError /> },
  { path: "/new-password", element: <NewPasswordPage />, errorElement: <RouteError /> },
  {
    element: (
      <RequireSignIn>
        <Shell sidebar={<SessionList />} />
      </RequireSignIn>
    ),
    errorElement: <RouteError />,
    children: [
      { path: "/", element: <Navigate to="/chat" replace /> },
      { path: "/chat", element: <NewChatPage /> },
      { path: "/chat/:sessionId", element: <ConversationPage /> },
      { path: "/templates", element: <TemplatesPage /> },
      { path: "/templates/:templateId", element: <TemplatePage /> },
      { path: "/account", element: <AccountPage /> },
      {
        path: "/admin",
        element: <AdminPage />,
        children: [
          { index: true, element: <FirstAdminPage /> },
          { path: "users", element: <UsersPage /> },
          { path: "roles", element: <RolesPage /> },
          { path: "limits", element: <LimitsPage /> },
          { path: "devices", element: <DevicesPage /> },
          { path: "usage", element: <UsagePage /> },
          { path: "audit", element: <AuditPage /> },
        ],
      },
      { path: "*", element: <NotFoundPage /> },
    ],
  },
]);

export function App({ nonce }: { nonce: string }) {
  return (
    <MantineProvider
      theme={theme}
      cssVariablesResolver={variables}
      defaultColorScheme="auto"
      getStyleNonce={() => nonce}
    >
      <QueryClientProvider client={queries}>
        <ModalsProvider>
          <Notifications position="bottom-center" className={classes["notifications"] ?? ""} />
          <RouterProvider router={router} />
        </ModalsProvider>
      </QueryClientProvider>
    </MantineProvider>
  );
}
