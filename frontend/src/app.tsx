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
import { RegisterPage, SignInPage } from "./features/auth/sign-in";
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
    },
  },
});

const router = createBrowserRouter([
  { path: "/sign-in", element: <SignInPage />, errorElement: <RouteError /> },
  { path: "/register", element: <RegisterPage />, errorElement: <RouteError /> },
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
