/** What the copies print, as it comes, merged. A bounded number of lines is kept. */
import { useEffect, useRef, useState } from "react";
import { problemOf, withQuery, workloadPath } from "../api/client";
import type { Allocation, Key, LogRecord, Page } from "../api/types";
import { pauseBefore } from "../lib/backoff";
import { Lines } from "../lib/lines";
import { inputStyle } from "../ui/act";
import { Button, Card } from "../ui/parts";
import { useGet } from "../ui/query";

const KEPT = 5000;
const TAIL = 200;
/** Lines are drawn together, so that many cost no more than few. */
const DRAW_MS = 100;
/** Of each copy its own; the name stands beside it. */
const COLOURS = ["text-accent", "text-good", "text-busy", "text-bad", "text-soft"];

export function Logs({ of, copy, choose }: { of: Key; copy?: string; choose: (copy?: string) => void }) {
  const [lines, setLines] = useState<LogRecord[]>([]);
  const [state, setState] = useState("connecting");
  const [filter, setFilter] = useState("");
  const [follow, setFollow] = useState(true);
  const box = useRef<HTMLDivElement>(null);
  const path = `${workloadPath(of)}/logs`;
  const copies = useGet<Page<Allocation>>(`${workloadPath(of)}/allocations`).data?.items ?? [];

  useEffect(() => {
    const stopped = new AbortController();
    let waiting: LogRecord[] = [];
    const draw = setInterval(() => {
      if (waiting.length === 0) return;
      const more = waiting;
      waiting = [];
      setLines((before) => [...before, ...more].slice(-KEPT));
    }, DRAW_MS);
    setLines([]);
    void tail(withQuery(path, { follow: true, tail: TAIL, copy }), stopped.signal, (record) => waiting.push(record), setState);
    return () => {
      stopped.abort();
      clearInterval(draw);
    };
  }, [path, copy]);
  useEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines, follow]);

  const names = [...new Set(lines.map((line) => line.copy))].sort();
  const wanted = filter.toLowerCase();
  const found = wanted ? lines.filter((line) => line.text.toLowerCase().includes(wanted)) : lines;
  const download = () => {
    const text = found.map((line) => `${line.at} ${line.copy} ${line.stream} ${line.text}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    link.download = `${of.workload}.log`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return (
    <Card
      flush
      title={
        <span>
          Logs <span className="font-normal text-soft">{state}</span>
        </span>
      }
      aside={
        <div className="flex flex-wrap gap-2">
          <select aria-label="Copy" value={copy ?? ""} onChange={(event) => choose(event.target.value || undefined)} className={`${inputStyle} w-auto!`}>
            <option value="">all copies</option>
            {[...new Set([...copies.map((a) => a.name), ...(copy ? [copy] : [])])].sort().map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
          <input
            aria-label="Show only lines with"
            placeholder="Show only …"
            value={filter}
            onChange={(event) => setFilter(event.target.value)}
            className={`${inputStyle} w-36!`}
          />
          <Button onClick={() => setFollow(!follow)}>{follow ? "Stop following" : "Follow"}</Button>
          <Button onClick={download} why={found.length === 0 && "there are no lines"}>
            Download
          </Button>
        </div>
      }
    >
      <div
        ref={box}
        tabIndex={0}
        role="log"
        aria-live="off"
        aria-label="Lines"
        onWheel={(event) => event.deltaY < 0 && setFollow(false)}
        className="h-[28rem] overflow-auto px-4 py-3 font-mono text-xs leading-5"
      >
        {found.length === 0 && <p className="font-sans text-soft">{lines.length ? "No line has that." : "Nothing has been printed yet."}</p>}
        {found.map((line, i) => (
          <div key={i} className="flex gap-3 whitespace-pre">
            <time className="text-soft" title={line.at}>
              {line.at.slice(11, 23)}
            </time>
            <span className={COLOURS[names.indexOf(line.copy) % COLOURS.length]}>{line.copy}</span>
            <span className={line.stream === "stderr" ? "text-bad" : line.stream === "optimus" ? "text-soft italic" : ""}>{line.text}</span>
          </div>
        ))}
      </div>
    </Card>
  );
}

/** Reads to the end of the page's life; after a break it asks only for what came since. */
async function tail(path: string, stopped: AbortSignal, take: (record: LogRecord) => void, told: (state: string) => void) {
  let since: string | undefined;
  for (let failures = 0; !stopped.aborted; failures++) {
    if (failures > 0) await new Promise((done) => setTimeout(done, pauseBefore(failures, Math.random()) + 200));
    try {
      const url = since ? path.replace(/tail=\d+/, `since=${encodeURIComponent(since)}`) : path;
      const response = await fetch(url, { headers: { accept: "application/x-ndjson" }, signal: stopped });
      if (!response.ok || !response.body) {
        const problem = await problemOf(response);
        told(problem.detail || problem.title);
        continue;
      }
      told("live");
      const lines = new Lines();
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        for (const line of lines.push(value)) {
          if (line.trim() === "") continue;
          const record = JSON.parse(line) as LogRecord;
          if (record.stream !== "optimus") {
            // Of the moment it broke off, lines may come again.
            if (since !== undefined && failures > 0 && record.at <= since) continue;
            since = record.at;
          }
          take(record);
        }
        failures = 0;
      }
      told("ended");
    } catch {
      if (!stopped.aborted) told("reconnecting");
    }
  }
}
