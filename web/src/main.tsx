import { MutationCache, QueryCache, QueryClient, QueryClientProvider } from "@tanstack/react-query";
import { RouterProvider } from "@tanstack/react-router";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { whenLoggedOut } from "./api/client";
import { stop } from "./api/live";
import "./app.css";
import { router } from "./router";

const client = new QueryClient({ queryCache: new QueryCache(), mutationCache: new MutationCache() });

whenLoggedOut(() => {
  stop();
  client.clear();
  if (router.state.location.pathname !== "/login") void router.navigate({ to: "/login" });
});

const root = document.getElementById("root");
if (root) {
  createRoot(root).render(
    <StrictMode>
      <QueryClientProvider client={client}>
        <RouterProvider router={router} />
      </QueryClientProvider>
    </StrictMode>,
  );
}
