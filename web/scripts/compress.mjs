// Compresses what the build made, once, and refuses a first load that is over its budget.
import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";

const SITE = new URL("../dist/site/", import.meta.url).pathname;
/** Script and style that the first page loads, gzip. */
const FIRST_LOAD_MAX = 200_000;

const files = (dir) =>
  readdirSync(dir).flatMap((name) => (statSync(join(dir, name)).isDirectory() ? files(join(dir, name)) : [join(dir, name)]));

const index = readFileSync(join(SITE, "index.html"), "utf8");
let first = 0;
let total = 0;
for (const file of files(SITE)) {
  if (file.endsWith(".br")) continue;
  const bytes = readFileSync(file);
  const gzip = gzipSync(bytes).length;
  total += gzip;
  if (index.includes(file.slice(SITE.length))) first += gzip;
  const brotli = brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } });
  if (brotli.length < bytes.length) writeFileSync(`${file}.br`, brotli);
}
console.log(`first load ${(first / 1000).toFixed(1)} kB gzip of ${FIRST_LOAD_MAX / 1000}, all files ${(total / 1000).toFixed(1)} kB`);
if (first > FIRST_LOAD_MAX) {
  console.error("the first load is over its budget");
  process.exit(1);
}
