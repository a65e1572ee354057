/** The way of a deployment, in order. */
export const RAIL = ["preparing", "placing", "starting", "health", "shifting", "baking", "promoting", "done"] as const;

export type Tone = "good" | "busy" | "bad" | "idle";

const TONES: Record<string, Tone> = {
  ready: "good",
  running: "good",
  up: "good",
  done: "good",
  succeeded: "good",
  leader: "good",
  voter: "good",
  deploying: "busy",
  starting: "busy",
  pending: "busy",
  active: "busy",
  waiting: "busy",
  stopping: "busy",
  draining: "busy",
  rolling_back: "busy",
  degraded: "bad",
  failed: "bad",
  backoff: "bad",
  down: "bad",
  rolled_back: "bad",
  silent: "bad",
};

export function tone(phase: string): Tone {
  if (TONES[phase]) return TONES[phase];
  return (RAIL as readonly string[]).includes(phase) ? "busy" : "idle";
}

export const isOver = (phase: string) => ["done", "failed", "rolled_back", "superseded", "cancelled"].includes(phase);

/** Where each station of the rail stands, seen from the present phase. */
export function stations(phase: string): { name: string; state: "past" | "now" | "ahead" | "failed" }[] {
  const at = (RAIL as readonly string[]).indexOf(phase);
  return RAIL.map((name, i) => {
    if (phase === "done") return { name, state: "past" };
    if (at < 0) return { name, state: "ahead" };
    return { name, state: i < at ? "past" : i === at ? "now" : "ahead" };
  });
}
