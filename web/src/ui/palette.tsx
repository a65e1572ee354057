/** Ctrl-K: to any page, workload or node by a few letters. */
import { useNavigate } from "@tanstack/react-router";
import { useEffect, useRef, useState } from "react";
import type { Node, Page, Workload } from "../api/types";
import { Button } from "./parts";
import { useGet } from "./query";
import { PAGES } from "./shell";

interface Entry {
  name: string;
  kind: string;
  go: () => void;
}

/** One page of each is looked through; more letters do not ask for more. */
const LOOKED_THROUGH = 200;
const SHOWN = 12;

export function Palette() {
  const [open, setOpen] = useState(false);
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "k") {
        event.preventDefault();
        setOpen(true);
      }
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);
  return (
    <>
      <Button onClick={() => setOpen(true)}>
        Go to <kbd className="rounded border border-line px-1 text-xs text-soft">Ctrl K</kbd>
      </Button>
      {open && <Choice close={() => setOpen(false)} />}
    </>
  );
}

function Choice({ close }: { close: () => void }) {
  const navigate = useNavigate();
  const dialog = useRef<HTMLDialogElement>(null);
  const [text, setText] = useState("");
  const [at, setAt] = useState(0);
  useEffect(() => dialog.current?.showModal(), []);
  const workloads = useGet<Page<Workload>>("/v1/workloads", { page_size: LOOKED_THROUGH }).data?.items ?? [];
  const nodes = useGet<Page<Node>>("/v1/nodes", { page_size: LOOKED_THROUGH }).data?.items ?? [];
  const all: Entry[] = [
    ...PAGES.map((page) => ({ name: page.name, kind: "page", go: () => void navigate({ to: page.to }) })),
    ...workloads.map((w) => ({
      name: `${w.project}/${w.environment}/${w.workload}`,
      kind: w.spec.kind,
      go: () => void navigate({ to: "/services/$project/$environment/$workload", params: w }),
    })),
    ...nodes.map((n) => ({ name: n.name, kind: "node", go: () => void navigate({ to: "/nodes/$node", params: { node: n.name } }) })),
  ];
  const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = all.filter((entry) => wanted.every((part) => `${entry.name} ${entry.kind}`.toLowerCase().includes(part))).slice(0, SHOWN);
  const take = (entry: Entry | undefined) => {
    if (!entry) return;
    dialog.current?.close();
    entry.go();
  };
  return (
    <dialog
      ref={dialog}
      onClose={close}
      aria-label="Go to"
      className="mx-auto mt-24 w-[min(36rem,calc(100vw-2rem))] rounded-xl border border-line bg-card p-0 text-text shadow-xl"
    >
      <input
        autoFocus
        role="combobox"
        aria-label="Go to a page, service or node"
        aria-expanded="true"
        aria-controls="palette"
        aria-activedescendant={found[at] ? `palette-${at}` : undefined}
        placeholder="A page, service or node"
        value={text}
        onChange={(event) => {
          setText(event.target.value);
          setAt(0);
        }}
        onKeyDown={(event) => {
          const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
          if (step) {
            event.preventDefault();
            setAt((at + step + found.length) % Math.max(1, found.length));
          } else if (event.key === "Enter") take(found[at]);
        }}
        className="w-full border-b border-line bg-transparent px-4 py-3 outline-none"
      />
      <ul id="palette" role="listbox" aria-label="Found" className="max-h-80 overflow-y-auto p-2">
        {found.map((entry, i) => (
          <li
            key={`${entry.kind} ${entry.name}`}
            id={`palette-${i}`}
            role="option"
            aria-selected={i === at}
            onClick={() => take(entry)}
            className={`flex cursor-pointer justify-between rounded-lg px-3 py-1.5 ${i === at ? "bg-accent-soft text-accent" : "hover:bg-idle-soft"}`}
          >
            <span>{entry.name}</span>
            <span className={`text-xs ${i === at ? "text-accent" : "text-soft"}`}>{entry.kind}</span>
          </li>
        ))}
      </ul>
      {found.length === 0 && <p className="px-5 pb-4 text-soft">Nothing is called that.</p>}
    </dialog>
  );
}
