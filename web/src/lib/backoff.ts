const FIRST_MS = 500;
const MOST_MS = 10_000;

/** Pause before try `n` (1 is the first after a failure): full jitter, so that many pages do not come back at once. */
export function pauseBefore(n: number, dice: number): number {
  return Math.round(dice * Math.min(MOST_MS, FIRST_MS * 2 ** (Math.min(n, 10) - 1)));
}
