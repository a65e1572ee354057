// Pictures of every page in both themes, wide, middling and narrow: to be looked at.
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { open, PAGES, settled, start } from "./harness.mjs";

const [optimus, into = "shots"] = process.argv.slice(2);
const root = new URL("../../", import.meta.url).pathname;
const world = await start(optimus, [join(root, "examples/python-web"), join(root, "examples/memory-hog")].slice(0, 1));
try {
  world.cli("deploy", "--no-wait", join(root, "examples/memory-hog"));
  const { page } = await open(world);
  mkdirSync(into, { recursive: true });
  const node = await page.evaluate(async () => (await (await fetch("/v1/nodes")).json()).items[0].name);
  const deployment = await page.evaluate(async () => (await (await fetch("/v1/deployments")).json()).items[0].id);
  for (const [name, path] of [...PAGES, ["node", `/nodes/${node}`], ["deployment", `/deployments/${deployment}`]]) {
    await page.goto(world.origin + path);
    await settled(page);
    for (const theme of ["light", "dark"]) {
      await page.evaluate((to) => (document.documentElement.dataset.theme = to), theme);
      for (const width of [1440, 768, 320]) {
        await page.setViewportSize({ width, height: 900 });
        await page.screenshot({ path: join(into, `${name}-${theme}-${width}.png`), fullPage: true });
      }
    }
  }
} finally {
  await world.end();
}
