import { Link } from "@tanstack/react-router";
import type { ReactNode } from "react";
import type { Cluster, Deployment, Event, Node, Page, Status, Workload } from "../api/types";
import { bytes, cores, share } from "../lib/format";
import { isOver } from "../lib/phases";
import { linkStyle, Where, WorkloadLink } from "../ui/links";
import { Ago, Badge, Bar, Card, Command, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Feed } from "./events";

/** One page of each collection is what this page looks at, whatever there is. */
const LOOKED_AT = 200;

export function OverviewPage() {
  const status = useGet<Status>("/v1/status");
  const cluster = useGet<Cluster>("/v1/cluster");
  const workloads = useGet<Page<Workload>>("/v1/workloads", { page_size: LOOKED_AT });
  const nodes = useGet<Page<Node>>("/v1/nodes", { page_size: LOOKED_AT });
  const deployments = useGet<Page<Deployment>>("/v1/deployments", { page_size: 20 });
  const events = useGet<Page<Event>>("/v1/events", { page_size: 12 });
  return (
    <>
      <Title>{status.data ? sentence(status.data.summary) : "Overview"}</Title>
      <div className="grid gap-4">
        {status.data && <Tiles status={status.data} nodes={nodes.data} />}
        <Attention cluster={cluster.data} workloads={workloads.data?.items} nodes={nodes.data?.items} status={status.data} />
        <div className="grid items-start gap-4 lg:grid-cols-2">
          <Card title="Deployments under way" flush aside={<Link to="/deployments" className={linkStyle}>All</Link>}>
            <Loaded of={deployments}>{(page) => <UnderWay of={page.items.filter((d) => !isOver(d.phase))} />}</Loaded>
          </Card>
          <Card title="What happened" flush aside={<Link to="/events" className={linkStyle}>More</Link>}>
            <Loaded of={events}>{(page) => <Feed events={page.items.toReversed()} />}</Loaded>
          </Card>
        </div>
        <Card title="Nodes" flush aside={<Link to="/nodes" className={linkStyle}>All</Link>}>
          <Loaded of={nodes}>{(page) => <Map of={page} />}</Loaded>
        </Card>
      </div>
    </>
  );
}

const sentence = (text: string) => text.charAt(0).toUpperCase() + text.slice(1);

function Tiles({ status, nodes }: { status: Status; nodes?: Page<Node> }) {
  const sum = (of: (node: Node) => number) => (nodes?.items ?? []).reduce((total, node) => total + of(node), 0);
  const [cpu, cpuAll] = [sum((n) => n.cpu_reserved), sum((n) => n.cpu)];
  const [memory, memoryAll] = [sum((n) => n.memory_reserved), sum((n) => n.memory)];
  const part = nodes?.next_page_token ? ` of the first ${nodes.items.length} nodes` : "";
  return (
    <div className="grid grid-cols-2 gap-3 lg:grid-cols-4">
      <Tile name="Copies ready" value={`${status.copies_ready} of ${status.copies_wanted}`} bad={status.copies_ready < status.copies_wanted} />
      <Tile name="Nodes up" value={`${status.nodes_up} of ${status.nodes_up + status.nodes_down}`} bad={status.nodes_down > 0} />
      <Tile name={`CPU reserved${part}`} value={cores(cpu)} more={<Bar part={share(cpu, cpuAll)} label={`of ${cores(cpuAll)}`} />} />
      <Tile name={`Memory reserved${part}`} value={bytes(memory)} more={<Bar part={share(memory, memoryAll)} label={`of ${bytes(memoryAll)}`} />} />
    </div>
  );
}

function Tile({ name, value, bad, more }: { name: string; value: string; bad?: boolean; more?: ReactNode }) {
  return (
    <div className="rounded-xl border border-line bg-card px-4 py-3">
      <p className="text-xs text-soft">{name}</p>
      <p className={`mt-0.5 text-lg font-semibold ${bad ? "text-bad" : ""}`}>{value}</p>
      {more && <div className="mt-1">{more}</div>}
    </div>
  );
}

interface AttentionProps {
  cluster?: Cluster;
  workloads?: Workload[];
  nodes?: Node[];
  status?: Status;
}

/** What a person should look at, the worst first, each with the next step. */
function Attention({ cluster, workloads, nodes, status }: AttentionProps) {
  if (!workloads || !nodes || !status) return null;
  const warnings = (cluster?.warnings ?? []).map((text) => (
    <Line key={text} what="control plane" phase="degraded" why={text} />
  ));
  const broken = workloads
    .filter((w) => w.phase === "degraded")
    .map((w) => (
      <Line
        key={`${w.project}/${w.environment}/${w.workload}`}
        what={<WorkloadLink of={w} />}
        phase={w.phase}
        why={`${w.copies_ready} of ${w.copies_wanted} ready. ${w.reason?.message ?? ""}`}
        hint={w.reason?.hint}
      />
    ));
  const lost = nodes
    .filter((n) => n.phase === "down")
    .map((n) => (
      <Line
        key={n.id}
        what={
          <Link to="/nodes/$node" params={{ node: n.name }} className={linkStyle}>
            {n.name}
          </Link>
        }
        phase="down"
        why={<>last seen <Ago at={n.last_seen} />; its copies are started elsewhere</>}
      />
    ));
  const lines = [...warnings, ...lost, ...broken];
  if (status.workloads === 0) return <FirstSteps nodes={nodes.length} />;
  return (
    <Card title="Needs attention" flush>
      {lines.length > 0 ? <ul className="divide-y divide-line">{lines}</ul> : <Empty title="Nothing. All is as it was asked for." />}
    </Card>
  );
}

function Line({ what, phase, why, hint }: { what: ReactNode; phase: string; why: ReactNode; hint?: string }) {
  return (
    <li className="flex flex-wrap items-baseline gap-x-3 gap-y-1 px-4 py-2.5">
      <Badge phase={phase} />
      <span className="font-medium">{what}</span>
      <span className="min-w-0 flex-1 basis-64 break-words">
        {why}
        {hint && <span className="block text-xs text-soft">{hint}</span>}
      </span>
    </li>
  );
}

function FirstSteps({ nodes }: { nodes: number }) {
  return (
    <Card title="First steps">
      <ol className="list-decimal space-y-3 pl-5">
        <li className={nodes > 0 ? "text-soft" : ""}>
          Let a host in{nodes > 0 ? " (done)" : ""}: <Command>optimus nodes join-token</Command>
        </li>
        <li>
          Write a project file: <Command>optimus init</Command>
        </li>
        <li>
          Deploy it: <Command>optimus deploy</Command>
        </li>
      </ol>
    </Card>
  );
}

function UnderWay({ of }: { of: Deployment[] }) {
  if (of.length === 0) return <Empty title="None" />;
  return (
    <ul className="divide-y divide-line">
      {of.map((d) => (
        <li key={d.id} className="flex flex-wrap items-center gap-2 px-4 py-2.5">
          <WorkloadLink of={d} />
          <Where of={d} />
          <Badge phase={d.paused ? "paused" : d.phase} />
          <Link to="/deployments/$id" params={{ id: d.id }} className={`${linkStyle} ml-auto`}>
            release {d.release}, {d.ready} of {d.wanted} ready
          </Link>
        </li>
      ))}
    </ul>
  );
}

function Map({ of }: { of: Page<Node> }) {
  if (of.items.length === 0) {
    return (
      <Empty title="No node has joined">
        <Command>optimus nodes join-token</Command>
      </Empty>
    );
  }
  return (
    <ul className="grid gap-2 p-4 sm:grid-cols-2 lg:grid-cols-3">
      {of.items.slice(0, 60).map((n) => (
        <li key={n.id} className="rounded-lg border border-line px-3 py-2">
          <div className="flex items-center justify-between gap-2">
            <Link to="/nodes/$node" params={{ node: n.name }} className={`${linkStyle} truncate font-medium`} title={n.name}>
              {n.name}
            </Link>
            <Badge phase={n.phase === "up" && n.cordoned ? "cordoned" : n.phase} />
          </div>
          <div className="mt-1.5 flex flex-wrap gap-x-4 gap-y-1">
            <Bar name="CPU" part={share(n.cpu_reserved, n.cpu)} label={`CPU: ${cores(n.cpu_reserved)} of ${cores(n.cpu)} reserved`} />
            <Bar name="Memory" part={share(n.memory_reserved, n.memory)} label={`Memory: ${bytes(n.memory_reserved)} of ${bytes(n.memory)} reserved`} />
          </div>
        </li>
      ))}
    </ul>
  );
}
