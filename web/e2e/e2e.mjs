// The console against a real server and agent, in Chromium: as a user meets it.
import assert from "node:assert/strict";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { AxeBuilder } from "@axe-core/playwright";
import { open, PAGES, settled, start, until } from "./harness.mjs";

const [optimus] = process.argv.slice(2);
const root = new URL("../../", import.meta.url).pathname;
const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
const world = await start(optimus, [join(root, "examples/python-web")]);
const step = (what) => console.log(`  ${what}`);

async function noViolations(page, where) {
  const { violations } = await new AxeBuilder({ page }).withTags(RULES).analyze();
  const told = violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).slice(0, 3).join(" | ")}`);
  assert.deepEqual(told, [], `axe on ${where}`);
}

try {
  const { page, context, faults, foreign } = await open(world);
  step("logs in by a link, which is good once");
  assert.equal(new URL(page.url()).hash, "", "the code stays in nobody's history");
  const cookie = (await context.cookies()).find((c) => c.name === "__Host-optimus");
  assert.ok(cookie?.httpOnly && cookie.secure && cookie.sameSite === "Strict");

  step("shows the example and follows a scale that was made elsewhere");
  await page.getByRole("heading", { level: 1, name: /All 3 copies of 1 workload are ready/ }).waitFor();
  await page.getByText("live", { exact: true }).waitFor();
  assert.equal(world.cli("scale", "web", "2").status, 0);
  await page.getByRole("heading", { level: 1, name: /All 2 copies/ }).waitFor();

  step("scales by hand, with the keyboard alone");
  await page.keyboard.press("Control+k");
  await page.getByRole("combobox").fill("web/dev");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { level: 1, name: "web" }).waitFor();
  await page.getByRole("button", { name: "Scale" }).focus();
  await page.keyboard.press("Enter");
  await page.getByRole("spinbutton", { name: "Copies" }).fill("3");
  await page.keyboard.press("Enter");
  await page.getByText("3 of 3 ready").waitFor();
  await noViolations(page, "the service");

  step("reads what the copies print");
  await page.getByRole("tab", { name: "Logs" }).click();
  await page.getByRole("log").getByText("web-0").first().waitFor();
  await page.getByRole("combobox", { name: "Copy" }).selectOption("web-0");
  await page.getByRole("log").getByText("web-0").first().waitFor();
  assert.equal(await page.getByRole("log").getByText("web-1").count(), 0);

  step("draws what they use");
  await page.getByRole("tab", { name: "Metrics" }).click();
  await page.getByRole("img", { name: /Memory in use: now/ }).waitFor();

  step("shows why a broken release went back");
  const broken = join(world.dir, "broken");
  mkdirSync(broken);
  const spec = 'name = "web"\nproject = "python-web"\nrun = "python3 -c \'import sys; print(\\"no database\\"); sys.exit(3)\'"\ncopies = 3\ncpu = 0.25\nport = "auto"\n[update]\ndeadline = "20s"\n';
  writeFileSync(join(broken, "optimus.toml"), spec);
  const deployed = world.cli("deploy", broken);
  assert.equal(deployed.status, 6, deployed.stderr);
  await page.goto(`${world.origin}/deployments`);
  await page.getByText("rolled back").first().waitFor();
  await page.getByRole("row").filter({ hasText: "rolled back" }).getByRole("link", { name: /→/ }).click();
  await page.getByText(/exited with status 3/).first().waitFor();
  await noViolations(page, "the deployment");

  step("starts a run of a job and sees its end");
  const job = join(world.dir, "job");
  mkdirSync(job);
  writeFileSync(join(job, "optimus.toml"), 'project = "python-web"\n[job.tidy]\nrun = "sleep 0.1"\n');
  const made = world.cli("deploy", job);
  assert.equal(made.status, 0, made.stderr);
  await page.goto(`${world.origin}/jobs`);
  await page.getByRole("link", { name: "tidy" }).click();
  await page.getByRole("button", { name: "Run now" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Run now" }).click();
  await page.getByRole("row").filter({ hasText: "succeeded" }).first().waitFor();

  step("sets a secret and shows only its name");
  await page.goto(`${world.origin}/secrets`);
  await page.getByRole("button", { name: "Set a secret" }).click();
  for (const [field, value] of [["project", "web"], ["environment", "dev"], ["name", "API_KEY"], ["value", "hush-hush-4711"]]) {
    await page.getByRole("dialog").getByLabel(field, { exact: true }).fill(value);
  }
  await page.getByRole("dialog").getByRole("button", { name: "Set a secret" }).click();
  await page.getByRole("cell", { name: "API_KEY" }).waitFor();
  assert.ok(!(await page.content()).includes("hush-hush-4711"));

  step("previews a drain, cordons and opens a node");
  await page.goto(`${world.origin}/nodes`);
  await page.getByRole("region", { name: "Nodes" }).getByRole("link").first().click();
  await page.getByRole("button", { name: "Drain" }).click();
  await page.getByLabel("What becomes of its copies").getByText("web-0").waitFor();
  await noViolations(page, "the drain's dialog");
  await page.getByRole("dialog").getByRole("button", { name: "Cancel" }).click();
  await page.getByRole("button", { name: "Cordon" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Cordon" }).click();
  await page.getByText("cordoned").first().waitFor();
  await page.getByRole("button", { name: "Uncordon" }).click();
  await page.getByRole("button", { name: "Cordon" }).waitFor();

  step("has no violation on any page, in either theme, also when it is narrow");
  for (const [name, path] of PAGES) {
    await page.goto(world.origin + path);
    await settled(page);
    for (const theme of ["light", "dark"]) {
      await page.evaluate((to) => (document.documentElement.dataset.theme = to), theme);
      await noViolations(page, `${name}, ${theme}`);
    }
    await page.setViewportSize({ width: 320, height: 700 });
    await until(`${name} to fit into 320 px`, () => page.evaluate(() => document.documentElement.scrollWidth <= 320));
    await page.setViewportSize({ width: 1440, height: 900 });
  }

  step("says when it is cut off, and comes back");
  await page.goto(world.origin);
  await page.getByText("live", { exact: true }).waitFor();
  await context.setOffline(true);
  // A stream that is open outlives the switch of the browser's network; a page that is loaded anew would not come at all.
  await page.evaluate(() => dispatchEvent(new Event("offline")));
  await page.getByText(/^reconnecting/).waitFor();
  await noViolations(page, "the overview, cut off");
  await context.setOffline(false);
  await page.getByText("live", { exact: true }).waitFor();

  step("logs out, and the cookie is worth nothing any more");
  const seen = faults().filter((text) => !text.includes("ERR_INTERNET_DISCONNECTED"));
  await page.getByRole("button", { name: "Log out" }).click();
  await page.getByRole("heading", { name: "Log in" }).waitFor();
  await noViolations(page, "the login");
  await context.addCookies([cookie]);
  assert.equal((await context.request.get(`${world.origin}/v1/status`)).status(), 401);

  assert.deepEqual(seen, [], "errors in the console");
  assert.deepEqual(foreign, [], "fetched from elsewhere");
  console.log("the console works");
} catch (error) {
  const shown = world.browser.contexts().flatMap((context) => context.pages());
  for (const page of shown) console.error(`---- ${page.url()}\n${await page.locator("body").innerText().catch(() => "")}`);
  console.error(error, `\n---- optimus dev\n${world.said().slice(-3000)}`);
  process.exitCode = 1;
} finally {
  await world.end();
}
