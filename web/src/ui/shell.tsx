/** What stands around every page: the way to the others, whether it is live, the theme, the palette. */
import { useQueryClient } from "@tanstack/react-query";
import { Link, Outlet, useNavigate } from "@tanstack/react-router";
import { useEffect, useState } from "react";
import { remove } from "../api/client";
import { start, stop, useLive } from "../api/live";
import { span } from "../lib/format";
import { Button, useNow } from "./parts";
import { Palette } from "./palette";

export const PAGES = [
  { to: "/", name: "Overview" },
  { to: "/services", name: "Services" },
  { to: "/deployments", name: "Deployments" },
  { to: "/jobs", name: "Jobs" },
  { to: "/nodes", name: "Nodes" },
  { to: "/secrets", name: "Secrets" },
  { to: "/events", name: "Events" },
] as const;

export function Shell() {
  const client = useQueryClient();
  useEffect(() => {
    start(() => void client.invalidateQueries());
    return stop;
  }, [client]);
  return (
    <div className="md:grid md:min-h-screen md:grid-cols-[13rem_1fr]">
      <a href="#main" className="sr-only focus:not-sr-only focus:absolute focus:z-10 focus:m-2 focus:rounded focus:bg-card focus:p-2">
        To the content
      </a>
      <aside className="border-line bg-card max-md:border-b md:border-r">
        <div className="flex items-center gap-2 px-4 pt-4 pb-2 md:pb-4">
          <img src="/favicon.svg" alt="" className="size-6" />
          <span className="font-semibold tracking-tight">Optimus</span>
        </div>
        <nav aria-label="Pages" className="flex gap-0.5 overflow-x-auto px-2 pb-2 md:flex-col">
          {PAGES.map((page) => (
            <Link
              key={page.to}
              to={page.to}
              activeOptions={{ exact: page.to === "/" }}
              className="rounded-lg px-2.5 py-1.5 text-sm whitespace-nowrap text-soft hover:bg-idle-soft hover:text-text aria-[current=page]:bg-accent-soft aria-[current=page]:font-medium aria-[current=page]:text-accent"
            >
              {page.name}
            </Link>
          ))}
        </nav>
      </aside>
      <div className="min-w-0">
        <header className="flex flex-wrap items-center justify-end gap-2 border-b border-line bg-card px-4 py-2">
          <Indicator />
          <Palette />
          <Theme />
          <LogOut />
        </header>
        <main id="main" className="mx-auto max-w-6xl p-4 md:p-6">
          <Outlet />
        </main>
      </div>
    </div>
  );
}

/** What is shown is never taken for live when it is not. */
function Indicator() {
  const live = useLive();
  const now = useNow();
  const lost = live.state === "reconnecting";
  const text = lost ? `reconnecting, ${span(now - live.since)} old` : live.state;
  return (
    <span role="status" className={`mr-auto inline-flex items-center gap-1.5 text-xs ${lost ? "font-medium text-bad" : "text-soft"}`}>
      <span aria-hidden="true" className={`size-2 ${lost ? "bg-bad" : live.state === "live" ? "rounded-full bg-good" : "rounded-full bg-busy"}`} />
      {text}
    </span>
  );
}

function Theme() {
  const [dark, setDark] = useState(document.documentElement.dataset.theme === "dark");
  const turn = () => {
    const next = dark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // Without storage it lasts until the page is left.
    }
    setDark(!dark);
  };
  return <Button onClick={turn}>{dark ? "Light" : "Dark"}</Button>;
}

function LogOut() {
  const navigate = useNavigate();
  const leave = async () => {
    await remove("/v1/sessions").catch(() => {});
    stop();
    await navigate({ to: "/login" });
  };
  return <Button onClick={() => void leave()}>Log out</Button>;
}
