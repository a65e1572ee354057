import tailwind from "@tailwindcss/vite";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [react(), tailwind()],
  build: { outDir: "dist/site", target: "es2022", assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  // `npm run dev` beside `optimus dev`; log in there first.
  server: { proxy: { "/v1": { target: "https://127.0.0.1:7600", secure: false, changeOrigin: true } } },
});
