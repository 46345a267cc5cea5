import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

const portal = "http://localhost:8000";

export default defineConfig({
  plugins: [react()],
  // The portal puts a nonce of its own into every page that it serves.
  html: { cspNonce: "CSP_NONCE" },
  build: {
    rolldownOptions: { input: ["index.html", "docs.html"] },
    // Inlined files would need `data:` in the policy for fonts and scripts.
    assetsInlineLimit: 0,
    // One file: a part that is fetched later may find the network, or the portal's next version, gone.
    chunkSizeWarningLimit: 1600,
    // Browsers that know light-dark(), which would be rewritten into something Mantine's schemes do not set.
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
  },
  server: {
    proxy: { "/api": portal, "/health": portal, "/openapi.json": portal, "/asyncapi.json": portal },
  },
});
