/** Every page and what of it stands in the address. */
import { createRootRoute, createRoute, createRouter, Outlet, redirect } from "@tanstack/react-router";
import { DeploymentPage, DeploymentsPage } from "./pages/deployments";
import { EventsPage } from "./pages/events";
import { JobPage, JobsPage } from "./pages/jobs";
import { hasCode, LoginPage } from "./pages/login";
import { NodePage, NodesPage } from "./pages/nodes";
import { OverviewPage } from "./pages/overview";
import { SecretsPage } from "./pages/secrets";
import { ServicePage } from "./pages/service";
import { ServicesPage } from "./pages/services";
import { Shell } from "./ui/shell";
import { Empty, Title } from "./ui/parts";

export interface ListSearch {
  project?: string;
  environment?: string;
  workload?: string;
  page?: string;
}

const text = (value: unknown) => (typeof value === "string" && value !== "" ? value : undefined);
const listSearch = (search: Record<string, unknown>): ListSearch => ({
  project: text(search.project),
  environment: text(search.environment),
  workload: text(search.workload),
  page: text(search.page),
});
const tabSearch = (search: Record<string, unknown>): { tab?: string; copy?: string } => ({
  tab: text(search.tab),
  copy: text(search.copy),
});

const root = createRootRoute({ component: Outlet, notFoundComponent: Lost });
const login = createRoute({ getParentRoute: () => root, path: "/login", component: LoginPage });
const shell = createRoute({
  getParentRoute: () => root,
  id: "shell",
  component: Shell,
  // A link that logs in is used before anything is asked.
  beforeLoad: () => {
    if (hasCode()) throw redirect({ to: "/login" });
  },
});
const overview = createRoute({ getParentRoute: () => shell, path: "/", component: OverviewPage });
const services = createRoute({ getParentRoute: () => shell, path: "/services", component: ServicesPage, validateSearch: listSearch });
const service = createRoute({
  getParentRoute: () => shell,
  path: "/services/$project/$environment/$workload",
  component: ServicePage,
  validateSearch: tabSearch,
});
const deployments = createRoute({
  getParentRoute: () => shell,
  path: "/deployments",
  component: DeploymentsPage,
  validateSearch: listSearch,
});
const deployment = createRoute({ getParentRoute: () => shell, path: "/deployments/$id", component: DeploymentPage });
const jobs = createRoute({ getParentRoute: () => shell, path: "/jobs", component: JobsPage, validateSearch: listSearch });
const job = createRoute({
  getParentRoute: () => shell,
  path: "/jobs/$project/$environment/$workload",
  component: JobPage,
  validateSearch: listSearch,
});
const nodes = createRoute({ getParentRoute: () => shell, path: "/nodes", component: NodesPage, validateSearch: listSearch });
const node = createRoute({ getParentRoute: () => shell, path: "/nodes/$node", component: NodePage });
const secrets = createRoute({ getParentRoute: () => shell, path: "/secrets", component: SecretsPage, validateSearch: listSearch });
const events = createRoute({ getParentRoute: () => shell, path: "/events", component: EventsPage });

function Lost() {
  return (
    <main className="p-8">
      <Title>There is no such page</Title>
      <Empty title="The address may be misspelt">
        <a className="text-accent underline" href="/">
          To the overview
        </a>
      </Empty>
    </main>
  );
}

const pages = [overview, services, service, deployments, deployment, jobs, job, nodes, node, secrets, events];
export const router = createRouter({ routeTree: root.addChildren([login, shell.addChildren(pages)]), scrollRestoration: true });

declare module "@tanstack/react-router" {
  interface Register {
    router: typeof router;
  }
}
