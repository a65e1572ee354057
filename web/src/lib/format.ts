/** Numbers and times for people. */

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(n: number): string {
  let [value, unit] = [n, 0];
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : Number(value.toFixed(1))} ${UNITS[unit]}`;
}

export function cores(n: number): string {
  return `${Number(n.toFixed(n < 0.1 ? 3 : 2))} ${n === 1 ? "core" : "cores"}`;
}

export function count(n: number, one: string, many: string): string {
  return `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
}

/** `42 s`, `5 min`, `3 h`, `12 d`: one unit is enough for a list. */
export function span(ms: number): string {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86_400 * 2) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86_400)} d`;
}

export function ago(at: string | number | Date, now: number): string {
  const ms = now - new Date(at).getTime();
  return ms < 1500 ? "just now" : `${span(ms)} ago`;
}

/** With the zone, for the tooltip and whoever writes it down. */
export function absolute(at: string | number | Date): string {
  const date = new Date(at);
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return `${date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" })} (${zone})`;
}

export function share(part: number, whole: number): number {
  return whole > 0 ? Math.min(1, part / whole) : 0;
}
