/**
 * One stream of events for the whole page. Whatever happens in the cluster is an event; each makes the queries on the
 * screen ask again, at most a few times a second. The stream goes on where it broke off, by index.
 */
import { useSyncExternalStore } from "react";
import { Lines } from "../lib/lines";
import { pauseBefore } from "../lib/backoff";
import { get, problemOf, withQuery } from "./client";
import type { Event, Status } from "./types";

export type Live = { state: "connecting" | "live" } | { state: "reconnecting"; since: number };

/** Two heartbeats and a little. */
const SILENT_MS = 25_000;
/** Changes closer together than this are looked at once. */
const GATHER_MS = 250;

let live: Live = { state: "connecting" };
const watchers = new Set<() => void>();
let onChange: () => void = () => {};
let running: AbortController | undefined;

function set(next: Live) {
  if (next.state === live.state) return;
  live = next;
  for (const watcher of watchers) watcher();
}

export function useLive(): Live {
  return useSyncExternalStore(
    (watcher) => {
      watchers.add(watcher);
      return () => watchers.delete(watcher);
    },
    () => live,
  );
}

/** Follows until `stop`; `changed` is called after every change. */
export function start(changed: () => void) {
  stop();
  onChange = changed;
  running = new AbortController();
  void follow(running.signal);
}

export function stop() {
  running?.abort();
  running = undefined;
}

async function follow(stopped: AbortSignal) {
  let since: number | undefined;
  for (let failures = 0; !stopped.aborted; failures++) {
    if (failures > 0) {
      set({ state: "reconnecting", since: Date.now() });
      await new Promise((done) => setTimeout(done, pauseBefore(failures, Math.random())));
    }
    try {
      since ??= (await get<Status>("/v1/status", {}, stopped)).index;
      await read(since, stopped, (index) => {
        failures = 0;
        since = index ?? since;
      });
    } catch (error) {
      // Events that are no longer kept are made up for by looking at everything again.
      if (error instanceof Gone) since = undefined;
    }
  }
}

class Gone extends Error {}

async function read(since: number, stopped: AbortSignal, heard: (index?: number) => void) {
  const silence = new AbortController();
  const signal = AbortSignal.any([stopped, silence.signal]);
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  // The browser knows sooner than the silence tells.
  addEventListener("offline", () => silence.abort(), { signal });
  let gathering: ReturnType<typeof setTimeout> | undefined;
  try {
    const path = withQuery("/v1/events", { follow: true, since });
    const response = await fetch(path, { headers: { accept: "application/x-ndjson" }, signal });
    if (response.status === 410) throw new Gone();
    if (!response.ok || !response.body) throw new Error((await problemOf(response)).title);
    set({ state: "live" });
    heard();
    // What happened between the last look and now.
    onChange();
    const lines = new Lines();
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      const events = lines.push(value).filter((line) => line.trim() !== "");
      const last = events.at(-1);
      if (last === undefined) continue;
      heard((JSON.parse(last) as Event).index);
      gathering ??= setTimeout(() => {
        gathering = undefined;
        onChange();
      }, GATHER_MS);
    }
  } finally {
    clearTimeout(timer);
  }
}
