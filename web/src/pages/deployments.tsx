import { Link, useNavigate, useParams, useSearch } from "@tanstack/react-router";
import { post, workloadPath } from "../api/client";
import type { Allocation, Deployment, Page } from "../api/types";
import { span } from "../lib/format";
import { isOver, stations } from "../lib/phases";
import { Act } from "../ui/act";
import { linkStyle, Where, WorkloadLink } from "../ui/links";
import { Ago, Badge, Card, Empty, Title, useNow } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Scope } from "../ui/scope";
import { Pager, Table } from "../ui/table";
import { CopyState } from "./service";

export function DeploymentsPage() {
  const search = useSearch({ from: "/shell/deployments" });
  const navigate = useNavigate();
  const { project, environment, workload, page } = search;
  const deployments = useGet<Page<Deployment>>("/v1/deployments", { project, environment, workload, page_size: 50, page_token: page });
  return (
    <>
      <Title>Deployments</Title>
      <Card flush title="The newest first" aside={<Scope of={search} to={(to) => void navigate({ to: "/deployments", search: to })} />}>
        <Loaded of={deployments} lines={6}>
          {(list) => (
            <>
              <DeploymentTable of={list.items} named />
              <Pager
                first={!page}
                next={list.next_page_token}
                to={(token) => void navigate({ to: "/deployments", search: { ...search, page: token } })}
              />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}

export function DeploymentTable({ of, named }: { of: Deployment[]; named: boolean }) {
  if (of.length === 0) return <Empty title="Nothing has been deployed" />;
  const name = [
    { name: "Service", cell: (d: Deployment) => <WorkloadLink of={d} /> },
    { name: "In", cell: (d: Deployment) => <Where of={d} />, wide: true },
  ];
  return (
    <Table
      of="Deployments"
      rows={of}
      id={(d) => d.id}
      columns={[
        ...(named ? name : []),
        {
          name: "Release",
          cell: (d) => (
            <Link to="/deployments/$id" params={{ id: d.id }} className={linkStyle}>
              {d.from_release ? `${d.from_release} → ${d.release}` : d.release}
            </Link>
          ),
        },
        { name: "State", cell: (d) => <Badge phase={d.paused ? "paused" : d.phase} /> },
        { name: "By", cell: (d) => d.trigger, wide: true },
        { name: "Strategy", cell: (d) => d.strategy, wide: true },
        { name: "Began", cell: (d) => <Ago at={d.created_at} />, wide: true },
        { name: "Took", cell: (d) => (d.ended_at ? span(+new Date(d.ended_at) - +new Date(d.created_at)) : ""), wide: true, right: true },
        { name: "Why", cell: (d) => d.reason?.message ?? "" },
      ]}
    />
  );
}

export function DeploymentPage() {
  const { id } = useParams({ from: "/shell/deployments/$id" });
  const deployment = useGet<Deployment>(`/v1/deployments/${encodeURIComponent(id)}`);
  const d = deployment.data;
  return (
    <>
      <Title above={d && <Where of={d} />} aside={d && <Steering of={d} />}>
        {d ? (
          <>
            <WorkloadLink of={d} />, release {d.release}
          </>
        ) : (
          "Deployment"
        )}
      </Title>
      <Loaded of={deployment}>
        {(shown) => (
          <div className="grid gap-4">
            <Rail of={shown} />
            {(shown.steps ?? []).length > 0 && <Steps of={shown} />}
            <Copies of={shown} />
          </div>
        )}
      </Loaded>
    </>
  );
}

function Steering({ of }: { of: Deployment }) {
  const path = workloadPath(of);
  const over = isOver(of.phase) && "the deployment has ended";
  const back = (of.phase === "rolling_back" && "it is going back already") || over;
  return (
    <>
      <Act
        label="Promote"
        look="main"
        why={back || (of.strategy === "rolling" && "a rolling update goes on by itself")}
        run={() => post(`${path}:promote`, {})}
      />
      {of.paused ? (
        <Act label="Resume" why={over} run={() => post(`${path}:resume`, {})} />
      ) : (
        <Act label="Pause" why={back} run={() => post(`${path}:pause`, {})} />
      )}
      <Act
        label="Abort"
        look="danger"
        why={back}
        ask={<p>The release before stays, or comes back where copies were replaced.</p>}
        run={() => post(`${path}:abort`, {})}
      />
      <Act label="Retry" why={!["failed", "rolled_back"].includes(of.phase) && "only what failed is tried again"} run={() => post(`${path}:retry`, {})} />
    </>
  );
}

const MARKS = { past: "bg-good", now: "bg-busy animate-pulse", ahead: "bg-idle-soft", failed: "bg-bad" };

function Rail({ of }: { of: Deployment }) {
  const now = useNow();
  const since = of.since ?? of.created_at;
  const left = of.deadline_at && !isOver(of.phase) ? +new Date(of.deadline_at) - now : undefined;
  return (
    <Card>
      <ol className="mb-4 grid grid-cols-4 gap-x-1 gap-y-3 sm:grid-cols-8" aria-label="Stations">
        {stations(of.phase).map((station) => (
          <li key={station.name} aria-current={station.state === "now" ? "step" : undefined}>
            <div className={`h-1.5 rounded-full ${MARKS[station.state]}`} />
            <span className={`mt-1 block text-xs ${station.state === "now" ? "font-semibold text-busy" : "text-soft"}`}>{station.name}</span>
          </li>
        ))}
      </ol>
      <div className="flex flex-wrap items-center gap-x-4 gap-y-1">
        <Badge phase={of.paused ? "paused" : of.phase} />
        <span>
          {of.ready} of {of.wanted} ready
        </span>
        <span className="text-soft">{of.strategy}, by {of.trigger}</span>
        {!isOver(of.phase) && <span className="text-soft">here for {span(now - +new Date(since))}</span>}
        {left !== undefined && <span className={left < 15_000 ? "font-medium text-bad" : "text-soft"}>{left > 0 ? `${span(left)} left` : "its time is over"}</span>}
        {of.ended_at && (
          <span className="text-soft">
            ended <Ago at={of.ended_at} />, after {span(+new Date(of.ended_at) - +new Date(of.created_at))}
          </span>
        )}
      </div>
      {of.reason && (
        <p className="mt-3 break-words">
          <span className="font-medium">{of.reason.message}</span>
          <span className="block text-soft">
            {of.reason.hint} ({of.reason.code})
          </span>
        </p>
      )}
    </Card>
  );
}

function Steps({ of }: { of: Deployment }) {
  return (
    <Card title={`Share of the traffic for release ${of.release}: ${of.weight ?? 0} %`}>
      <ol className="flex flex-wrap gap-2">
        {(of.steps ?? []).map((step, i) => (
          <li key={i} className="rounded-lg border border-line px-3 py-1.5">
            <span className="font-medium">{step.weight} %</span> <span className="text-soft">for {step.bake}, {step.status}</span>
          </li>
        ))}
      </ol>
      {of.traffic && (
        <p className="mt-3 text-soft">
          Counted by routers: {of.traffic.new.errors} of {of.traffic.new.requests} requests failed at the new copies, {of.traffic.old.errors} of{" "}
          {of.traffic.old.requests} at the old ones.
        </p>
      )}
    </Card>
  );
}

/** A failure opens on the copies that failed, with what they printed last. */
function Copies({ of }: { of: Deployment }) {
  const copies = useGet<Page<Allocation>>(`${workloadPath(of)}/allocations`);
  return (
    <Card title="Copies" flush>
      <Loaded of={copies}>
        {(page) => {
          const ours = page.items.filter((a) => a.release === of.release || a.release === of.from_release);
          const worst = ours.filter((a) => a.release === of.release && !a.ready && a.reason);
          if (ours.length === 0) return <Empty title="None is left" />;
          return (
            <>
              <Table
                of="Copies"
                rows={ours}
                id={(a) => a.id}
                columns={[
                  { name: "Copy", cell: (a) => a.name },
                  { name: "Release", cell: (a) => `${a.release}${a.release === of.release ? "" : ", the one before"}` },
                  { name: "State", cell: (a) => <CopyState of={a} /> },
                  { name: "Node", cell: (a) => a.node_name ?? "", wide: true },
                  { name: "Why", cell: (a) => (a.ready ? "" : (a.reason?.message ?? "")) },
                ]}
              />
              {worst.slice(0, 3).map((a) => (
                <section key={a.id} className="border-t border-line p-4">
                  <h3 className="font-medium">
                    {a.name}: {a.reason?.message}
                  </h3>
                  {(a.last_lines ?? []).length > 0 ? (
                    <pre tabIndex={0} className="mt-2 overflow-x-auto rounded-lg bg-bg p-3 text-xs leading-5">
                      {(a.last_lines ?? []).join("\n")}
                    </pre>
                  ) : (
                    <p className="mt-1 text-soft">It printed nothing.</p>
                  )}
                  <Link
                    to="/services/$project/$environment/$workload"
                    params={of}
                    search={{ tab: "Logs", copy: a.name }}
                    className={`${linkStyle} mt-2 inline-block`}
                  >
                    All its lines
                  </Link>
                </section>
              ))}
            </>
          );
        }}
      </Loaded>
    </Card>
  );
}
