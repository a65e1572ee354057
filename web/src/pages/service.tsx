import { Link, useNavigate, useParams, useSearch } from "@tanstack/react-router";
import { post, remove, workloadPath } from "../api/client";
import type { Allocation, Deployment, Explanation, Key, Page, Workload } from "../api/types";
import { bytes, cores } from "../lib/format";
import { isOver } from "../lib/phases";
import { Act, Field, inputStyle } from "../ui/act";
import { linkStyle, Where } from "../ui/links";
import { Ago, Badge, Card, Command, Empty, Tabs, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Table } from "../ui/table";
import { DeploymentTable } from "./deployments";
import { Feed } from "./events";
import { Logs } from "./logs";
import { CopyMetrics } from "./metrics";

const TABS = ["Copies", "Logs", "Metrics", "Deployments", "Why?", "Config"] as const;
type Tab = (typeof TABS)[number];

export function ServicePage() {
  const key = useParams({ from: "/shell/services/$project/$environment/$workload" });
  const { tab, copy } = useSearch({ from: "/shell/services/$project/$environment/$workload" });
  const navigate = useNavigate();
  const path = workloadPath(key);
  const workload = useGet<Workload>(path);
  const at = TABS.find((name) => name === tab) ?? "Copies";
  const to = (next: Tab, of?: string) =>
    void navigate({ to: "/services/$project/$environment/$workload", params: key, search: { tab: next, copy: of } });
  return (
    <>
      <Title above={<Where of={key} />} aside={workload.data && <Actions of={workload.data} />}>
        {key.workload}
      </Title>
      <Loaded of={workload}>
        {(w) => (
          <>
            <Summary of={w} />
            <Tabs tabs={TABS} at={at} to={(next) => to(next, copy)} />
            {at === "Copies" && <Copies of={key} release={w.release} />}
            {at === "Logs" && <Logs of={key} copy={copy} choose={(of) => to("Logs", of)} />}
            {at === "Metrics" && <CopyMetrics of={key} copy={copy} choose={(of) => to("Metrics", of)} />}
            {at === "Deployments" && <History of={key} />}
            {at === "Why?" && <Why path={path} />}
            {at === "Config" && <Config of={w} />}
          </>
        )}
      </Loaded>
    </>
  );
}

function Summary({ of }: { of: Workload }) {
  const { resources } = of.spec;
  return (
    <div className="mb-4 rounded-xl border border-line bg-card px-4 py-3">
      <div className="flex flex-wrap items-center gap-x-4 gap-y-1">
        <Badge phase={of.phase} />
        <span>
          {of.copies_ready} of {of.copies_wanted} ready
        </span>
        <span className="text-soft">release {of.release}</span>
        <span className="text-soft">
          {cores(resources.cpu)}, {bytes(resources.memory_request)} to {bytes(resources.memory_limit)} each
        </span>
        <span className="text-soft">
          changed <Ago at={of.updated_at} />
        </span>
      </div>
      {of.reason && of.phase !== "ready" && (
        <p className="mt-2 break-words">
          <span className="font-medium">{of.reason.message}</span> <span className="text-soft">{of.reason.hint}</span>
        </p>
      )}
      {of.deployment && !isOver(of.deployment.phase) && (
        <p className="mt-2">
          <Link to="/deployments/$id" params={{ id: of.deployment.id }} className={linkStyle}>
            Deployment of release {of.deployment.release} is under way
          </Link>
          {of.deployment.reason && <span className="text-soft">: {of.deployment.reason.message}</span>}
        </p>
      )}
      {of.endpoints.length > 0 && (
        <ul className="mt-2 flex flex-wrap gap-x-3">
          {of.endpoints.slice(0, 8).map((url) => (
            <li key={url}>
              <a href={url} target="_blank" rel="noreferrer" className={linkStyle}>
                {url}
              </a>
            </li>
          ))}
          {of.endpoints.length > 8 && <li className="text-soft">and {of.endpoints.length - 8} more</li>}
        </ul>
      )}
    </div>
  );
}

function Actions({ of }: { of: Workload }) {
  const navigate = useNavigate();
  const path = workloadPath(of);
  const name = `${of.project}/${of.environment}/${of.workload}`;
  const service = of.spec.kind === "service" ? false : `a ${of.spec.kind} has no number of copies to set`;
  const stopped = of.phase === "stopped" && "it is stopped already";
  const back = (!of.deployment && "it has only one release") || (of.release < 2 && "it has only one release");
  return (
    <>
      <Act
        label="Scale"
        why={service || stopped}
        ask={
          <>
            <Field label="Copies">
              <input name="copies" type="number" min={0} max={10_000} defaultValue={of.copies_wanted} required className={inputStyle} />
            </Field>
            <Command>{`optimus scale ${name} ${of.copies_wanted}`}</Command>
          </>
        }
        run={(form) => post(`${path}:scale`, { copies: Number(form.get("copies")) })}
      />
      <Act
        label="Restart"
        why={of.spec.kind === "job" && "a job is run, not restarted"}
        ask={<p>All copies are replaced, a few at a time, by copies of the same spec.</p>}
        run={() => post(`${path}:restart`)}
      />
      <Act
        label="Roll back"
        why={back}
        ask={
          <>
            <p>The release that ran before comes back, in the way this one came.</p>
            <Field label="Reason, for the others">
              <input name="reason" className={inputStyle} />
            </Field>
          </>
        }
        run={(form) => post(`${path}:rollback`, { reason: String(form.get("reason") ?? "") || undefined })}
      />
      <Act
        label="Stop"
        look="danger"
        why={stopped}
        ask={<p>All copies of {name} are stopped. It stays known; a restart or a deploy starts it again.</p>}
        run={() => post(`${path}:stop`)}
      />
      <Act
        label="Remove"
        look="danger"
        ask={
          <>
            <p>All copies of {name} are stopped, and its releases and history are forgotten. Nothing brings them back.</p>
            <Field label={`Type ${of.workload} to go on`}>
              <input name="name" required pattern={of.workload} autoComplete="off" className={inputStyle} />
            </Field>
          </>
        }
        run={() => remove(path)}
        then={() => void navigate({ to: "/services" })}
      />
    </>
  );
}

function Copies({ of, release }: { of: Key; release: number }) {
  const copies = useGet<Page<Allocation>>(`${workloadPath(of)}/allocations`);
  return (
    <Card title="Copies" flush>
      <Loaded of={copies}>
        {(page) =>
          page.items.length === 0 ? (
            <Empty title="There is no copy" />
          ) : (
            <Table
              of="Copies"
              rows={page.items}
              id={(a) => a.id}
              columns={[
                {
                  name: "Copy",
                  cell: (a) => (
                    <Link
                      to="/services/$project/$environment/$workload"
                      params={of}
                      search={{ tab: "Logs", copy: a.name }}
                      className={`${linkStyle} font-medium`}
                    >
                      {a.name}
                    </Link>
                  ),
                },
                { name: "State", cell: (a) => <CopyState of={a} /> },
                {
                  name: "Release",
                  cell: (a) => (a.release === release ? a.release : <Badge phase={`${a.release}, older`} as="idle" />),
                  wide: true,
                },
                {
                  name: "Node",
                  cell: (a) =>
                    a.node_name ? (
                      <Link to="/nodes/$node" params={{ node: a.node_name }} className={linkStyle}>
                        {a.node_name}
                      </Link>
                    ) : (
                      "none yet"
                    ),
                },
                { name: "Endpoint", cell: (a) => a.endpoint ?? "", wide: true },
                { name: "Restarts", cell: (a) => a.restarts, wide: true, right: true },
                { name: "Since", cell: (a) => <Ago at={a.started_at ?? a.created_at} />, wide: true },
                { name: "Why", cell: (a) => (a.ready ? "" : (a.reason?.message ?? "")) },
              ]}
            />
          )
        }
      </Loaded>
    </Card>
  );
}

export function CopyState({ of }: { of: Allocation }) {
  const phase = of.phase === "running" ? (of.ready ? "ready" : "not ready") : of.phase === "backoff" ? "restarting" : of.phase;
  const as = of.phase === "running" && !of.ready ? "busy" : of.phase === "backoff" ? "bad" : undefined;
  return (
    <span className="inline-flex flex-wrap gap-1">
      <Badge phase={phase} as={as} />
      {!of.current && <Badge phase="last seen so" as="idle" />}
    </span>
  );
}

function History({ of }: { of: Key }) {
  const query = { project: of.project, environment: of.environment, workload: of.workload, page_size: 50 };
  const deployments = useGet<Page<Deployment>>("/v1/deployments", query);
  return (
    <Card title="Deployments, the newest first" flush>
      <Loaded of={deployments}>{(page) => <DeploymentTable of={page.items} named={false} />}</Loaded>
    </Card>
  );
}

function Why({ path }: { path: string }) {
  const explanation = useGet<Explanation>(`${path}:explain`, {}, 5000);
  return (
    <Loaded of={explanation}>
      {(why) => (
        <div className="grid gap-4">
          <Card title="Why is it as it is?">
            <p className="font-medium break-words">{why.summary}</p>
            <ul className="mt-2 list-disc space-y-1 pl-5">
              {why.evidence.map((line) => (
                <li key={line} className="break-words">
                  {line}
                </li>
              ))}
            </ul>
            {why.hint && <p className="mt-3 rounded-lg bg-accent-soft px-3 py-2">{why.hint}</p>}
          </Card>
          <Card title="What happened" flush>
            <Feed events={why.events.toReversed()} />
          </Card>
        </div>
      )}
    </Loaded>
  );
}

function Config({ of }: { of: Workload }) {
  return (
    <Card title={`The spec of release ${of.release}`} aside={<Command>{`optimus deploy`}</Command>}>
      <pre tabIndex={0} className="max-h-[32rem] overflow-auto text-xs leading-5">
        {JSON.stringify(of.spec, null, 2)}
      </pre>
    </Card>
  );
}
