/** The small parts every page is made of. */
import { type ComponentProps, type ReactNode, useEffect, useRef, useState, useSyncExternalStore } from "react";
import { ApiError } from "../api/client";
import { absolute, ago } from "../lib/format";
import { type Tone, tone } from "../lib/phases";

const SHAPES: Record<Tone, ReactNode> = {
  good: <circle cx="6" cy="6" r="4.5" fill="currentColor" />,
  busy: <path d="M6 1.5a4.5 4.5 0 1 0 4.5 4.5" fill="none" stroke="currentColor" strokeWidth="2" strokeLinecap="round" />,
  bad: <path d="M6 1 11.4 10.6H.6Z" fill="currentColor" />,
  idle: <circle cx="6" cy="6" r="3.8" fill="none" stroke="currentColor" strokeWidth="1.6" />,
};
const COLOURS: Record<Tone, string> = {
  good: "bg-good-soft text-good",
  busy: "bg-busy-soft text-busy",
  bad: "bg-bad-soft text-bad",
  idle: "bg-idle-soft text-soft",
};

/** A state in a word, with a shape, so that colour is not all that tells it. */
export function Badge({ phase, as }: { phase: string; as?: Tone }) {
  const kind = as ?? tone(phase);
  return (
    <span className={`inline-flex items-center gap-1.5 rounded-full px-2 py-0.5 text-xs font-medium whitespace-nowrap ${COLOURS[kind]}`}>
      <svg viewBox="0 0 12 12" className="size-2.5" aria-hidden="true">
        {SHAPES[kind]}
      </svg>
      {phase.replaceAll("_", " ")}
    </span>
  );
}

export function Card({ title, aside, children, flush }: { title?: ReactNode; aside?: ReactNode; children: ReactNode; flush?: boolean }) {
  return (
    <section className="min-w-0 rounded-xl border border-line bg-card">
      {title && (
        <header className="flex flex-wrap items-center justify-between gap-2 border-b border-line px-4 py-2.5">
          <h2 className="text-sm font-semibold">{title}</h2>
          {aside}
        </header>
      )}
      <div className={flush ? "" : "p-4"}>{children}</div>
    </section>
  );
}

type ButtonProps = ComponentProps<"button"> & { look?: "plain" | "main" | "danger"; why?: string | false };

/** `why` says what stands against pressing it: it stays to be seen, and tells. */
export function Button({ look = "plain", why, className = "", children, onClick, ...rest }: ButtonProps) {
  const looks = {
    plain: "border border-line bg-card hover:bg-idle-soft",
    main: "bg-accent text-on-accent hover:opacity-90",
    danger: "border border-bad text-bad bg-card hover:bg-bad-soft",
  };
  return (
    <button
      type="button"
      {...rest}
      title={why || rest.title}
      aria-disabled={why ? true : undefined}
      onClick={why ? undefined : onClick}
      className={`inline-flex min-h-8 items-center justify-center gap-1.5 rounded-lg px-3 py-1 text-sm font-medium ${looks[look]} ${why ? "cursor-not-allowed opacity-60" : "cursor-pointer"} ${className}`}
    >
      {children}
    </button>
  );
}

let ticks = Date.now();
const tickers = new Set<() => void>();
setInterval(() => {
  ticks = Date.now();
  for (const tick of tickers) tick();
}, 1000);

/** The time, by the second, one timer for all. */
export function useNow(): number {
  return useSyncExternalStore(
    (tick) => {
      tickers.add(tick);
      return () => tickers.delete(tick);
    },
    () => ticks,
  );
}

export function Ago({ at }: { at: string | number }) {
  const now = useNow();
  return (
    <time dateTime={new Date(at).toISOString()} title={absolute(at)} className="whitespace-nowrap">
      {ago(at, now)}
    </time>
  );
}

export function Bar({ part, label, name }: { part: number; label: string; name?: string }) {
  const percent = Math.round(part * 100);
  return (
    <div className="flex items-center gap-2" title={label}>
      {name && <span className="text-xs text-soft">{name}</span>}
      <div className="h-1.5 w-20 overflow-hidden rounded-full bg-idle-soft" role="img" aria-label={label}>
        <div className={`h-full ${part > 0.9 ? "bg-bad" : "bg-accent"}`} style={{ width: `${percent}%` }} />
      </div>
      <span className="text-xs whitespace-nowrap text-soft">{percent} %</span>
    </div>
  );
}

export function Empty({ title, children }: { title: string; children?: ReactNode }) {
  return (
    <div className="px-4 py-8 text-center">
      <p className="font-medium">{title}</p>
      {children && <div className="mx-auto mt-1 max-w-md text-soft">{children}</div>}
    </div>
  );
}

export function Failed({ error, again }: { error: unknown; again?: () => void }) {
  const problem = error instanceof ApiError ? error.problem : undefined;
  return (
    <div role="alert" className="m-4 rounded-lg bg-bad-soft px-4 py-3 text-sm">
      <p className="font-medium text-bad">{problem ? problem.detail || problem.title : "The server cannot be reached"}</p>
      {problem?.hint && <p className="mt-0.5">{problem.hint}</p>}
      {problem?.code && (
        <p className="mt-1 text-xs">
          {problem.code}, request {problem.request_id}
        </p>
      )}
      {again && (
        <Button className="mt-2" onClick={again}>
          Try again
        </Button>
      )}
    </div>
  );
}

export function Loading({ lines = 3 }: { lines?: number }) {
  return (
    <div className="space-y-3 p-4" role="status" aria-label="Loading">
      {Array.from({ length: lines }, (_, i) => (
        <div key={i} className="h-4 animate-pulse rounded bg-idle-soft" style={{ width: `${90 - i * 15}%` }} />
      ))}
    </div>
  );
}

/** A command to take away. */
export function Command({ children }: { children: string }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(children).catch(() => {});
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return (
    <span className="inline-flex max-w-full items-center gap-1 rounded-lg border border-line bg-bg py-0.5 pr-1 pl-2 align-middle">
      <code className="overflow-x-auto text-xs whitespace-nowrap" tabIndex={0}>{children}</code>
      <button type="button" onClick={copy} className="min-h-6 min-w-6 cursor-pointer rounded px-1 text-xs text-accent hover:bg-idle-soft">
        {copied ? "copied" : "copy"}
      </button>
    </span>
  );
}

/** The heading of a page takes the focus when the page is new, so that it is read out. */
export function Title({ children, aside, above }: { children: ReactNode; aside?: ReactNode; above?: ReactNode }) {
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => heading.current?.focus({ preventScroll: true }), []);
  return (
    <header className="mb-4 flex flex-wrap items-end justify-between gap-x-4 gap-y-2">
      <div className="min-w-0">
        {above && <div className="text-xs text-soft">{above}</div>}
        <h1 ref={heading} tabIndex={-1} className="text-xl font-semibold tracking-tight break-words">
          {children}
        </h1>
      </div>
      {aside && <div className="flex flex-wrap items-center gap-2">{aside}</div>}
    </header>
  );
}

export function Tabs<T extends string>({ tabs, at, to }: { tabs: readonly T[]; at: T; to: (tab: T) => void }) {
  return (
    <div role="tablist" className="mb-4 flex gap-1 overflow-x-auto border-b border-line">
      {tabs.map((tab) => (
        <button
          key={tab}
          type="button"
          role="tab"
          aria-selected={tab === at}
          onClick={() => to(tab)}
          className={`-mb-px min-h-9 cursor-pointer border-b-2 px-3 text-sm whitespace-nowrap ${tab === at ? "border-accent font-medium text-accent" : "border-transparent text-soft hover:text-text"}`}
        >
          {tab}
        </button>
      ))}
    </div>
  );
}
