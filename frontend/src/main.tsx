import "@mantine/core/styles.css";
import "@mantine/notifications/styles.css";
import "./base.css";
import { setNonce } from "get-nonce";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./app";
import { watchFocus } from "./components/focus-return";

// Style elements that libraries add are allowed by the page's own nonce, and by nothing else.
const nonce = document.querySelector<HTMLMetaElement>('meta[property="csp-nonce"]')?.nonce ?? "";
setNonce(nonce);

watchFocus();
const root = document.getElementById("root");
if (root === null) throw new Error("index.html has no #root");
createRoot(root).render(
  <StrictMode>
    <App nonce={nonce} />
  </StrictMode>,
);
