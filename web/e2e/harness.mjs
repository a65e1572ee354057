// A real `optimus dev` on fresh ports and in a fresh directory, and a browser that is logged in. All of it ends with `end`.
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
export const PATIENCE = Number(process.env.OPTIMUS_PATIENCE ?? 60_000);

const freePort = () =>
  new Promise((done, failed) => {
    const server = createServer();
    server.on("error", failed);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => done(port));
    });
  });

export async function until(what, condition) {
  for (const end = Date.now() + PATIENCE; ; ) {
    const found = await condition();
    if (found) return found;
    if (Date.now() > end) throw new Error(`gave up waiting for ${what}`);
    await new Promise((next) => setTimeout(next, 50));
  }
}

export async function start(optimus, examples) {
  const dir = mkdtempSync(join(tmpdir(), "optimus-console-"));
  const env = { ...process.env, XDG_CONFIG_HOME: join(dir, "config"), XDG_DATA_HOME: join(dir, "data"), HOME: dir, NO_COLOR: "1" };
  const [api, agent, first] = [await freePort(), await freePort(), await freePort()];
  const ports = `${Math.min(first, 65_000)}-${Math.min(first, 65_000) + 60}`;
  const args = ["dev", ...examples, "--data-dir", join(dir, "state"), "--api-listen", `127.0.0.1:${api}`, "--agent-listen", `127.0.0.1:${agent}`, "--ports", ports];
  const server = spawn(optimus, args, { env, stdio: ["ignore", "pipe", "pipe"] });
  let said = "";
  for (const stream of [server.stdout, server.stderr]) stream.on("data", (bytes) => (said += bytes));
  const cli = (...words) => {
    const { status, stdout, stderr } = spawnSync(optimus, words, { env, encoding: "utf8" });
    return { status, stdout, stderr };
  };
  let browser;
  const end = async () => {
    await browser?.close();
    if (server.exitCode === null) {
      server.kill("SIGINT");
      await new Promise((done) => server.once("exit", done));
    }
    rmSync(dir, { recursive: true, force: true });
  };
  try {
    await until("the examples to be deployed", () => {
      if (server.exitCode !== null) throw new Error(`optimus dev ended:\n${said}`);
      return examples.length === 0 ? said.includes("next ") : said.includes("deployed ");
    });
    browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: FLAGS });
  } catch (error) {
    await end();
    throw error;
  }
  return { dir, cli, browser, said: () => said, end, origin: `https://127.0.0.1:${api}` };
}

/** A page logged in by a link of its own; what it complains of is gathered in `faults`. */
export async function open(world, options = {}) {
  const context = await world.browser.newContext({ ignoreHTTPSErrors: true, viewport: { width: 1440, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  const faults = [];
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  page.on("pageerror", (error) => faults.push(String(error)));
  const foreign = [];
  page.on("request", (request) => !request.url().startsWith(world.origin) && !request.url().startsWith("blob:") && foreign.push(request.url()));
  const link = world.cli("console").stdout.trim();
  await page.goto(link);
  await page.getByText("live", { exact: true }).waitFor();
  // Being sent to the login is an answer of 401, which browsers list as an error.
  const rest = () => faults.filter((text) => !text.includes("401"));
  return { page, context, faults: rest, foreign };
}

export const PAGES = [
  ["overview", "/"],
  ["services", "/services"],
  ["service", "/services/python-web/dev/web"],
  ["service-logs", "/services/python-web/dev/web?tab=Logs"],
  ["service-metrics", "/services/python-web/dev/web?tab=Metrics"],
  ["service-deployments", "/services/python-web/dev/web?tab=Deployments"],
  ["service-why", "/services/python-web/dev/web?tab=Why%3F"],
  ["service-config", "/services/python-web/dev/web?tab=Config"],
  ["deployments", "/deployments"],
  ["jobs", "/jobs"],
  ["nodes", "/nodes"],
  ["secrets", "/secrets"],
  ["events", "/events"],
  ["nothing", "/no/such/page"],
];

/** Loaded, and its first answers there. */
export async function settled(page) {
  await page.getByRole("heading", { level: 1 }).first().waitFor();
  await page.locator('[aria-label="Loading"]').first().waitFor({ state: "detached" });
}
