import { Link, useNavigate, useParams, useSearch } from "@tanstack/react-router";
import { nodePath, post } from "../api/client";
import type { Allocation, DrainPreview, Node, Page } from "../api/types";
import { bytes, cores, share } from "../lib/format";
import { Act, Field, inputStyle } from "../ui/act";
import { linkStyle, WorkloadLink } from "../ui/links";
import { Ago, Badge, Bar, Card, Command, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Pager, Table } from "../ui/table";
import { NodeMetrics } from "./metrics";
import { CopyState } from "./service";

function phase(of: Node): string {
  if (of.phase === "down") return "down";
  if (of.drain) return of.drain.done_at ? "drained" : "draining";
  return of.cordoned ? "cordoned" : "up";
}

export function NodesPage() {
  const search = useSearch({ from: "/shell/nodes" });
  const navigate = useNavigate();
  const nodes = useGet<Page<Node>>("/v1/nodes", { page_size: 100, page_token: search.page });
  return (
    <>
      <Title aside={<Command>optimus nodes join-token</Command>}>Nodes</Title>
      <Card flush>
        <Loaded of={nodes} lines={5}>
          {(list) => (
            <>
              {list.items.length === 0 ? (
                <Empty title="No node has joined">
                  A token of <Command>optimus nodes join-token</Command> lets one in.
                </Empty>
              ) : (
                <Table
                  of="Nodes"
                  rows={list.items}
                  id={(n) => n.id}
                  columns={[
                    {
                      name: "Name",
                      cell: (n) => (
                        <Link to="/nodes/$node" params={{ node: n.name }} className={`${linkStyle} font-medium`}>
                          {n.name}
                        </Link>
                      ),
                    },
                    { name: "State", cell: (n) => <Badge phase={phase(n)} /> },
                    { name: "Pool", cell: (n) => n.pool, wide: true },
                    { name: "Copies", cell: (n) => n.copies, right: true },
                    {
                      name: "CPU reserved",
                      cell: (n) => <Bar part={share(n.cpu_reserved, n.cpu)} label={`${cores(n.cpu_reserved)} of ${cores(n.cpu)}`} />,
                      wide: true,
                    },
                    {
                      name: "Memory reserved",
                      cell: (n) => <Bar part={share(n.memory_reserved, n.memory)} label={`${bytes(n.memory_reserved)} of ${bytes(n.memory)}`} />,
                      wide: true,
                    },
                    { name: "Address", cell: (n) => n.address, wide: true },
                    { name: "Seen", cell: (n) => <Ago at={n.last_seen} />, wide: true },
                  ]}
                />
              )}
              <Pager first={!search.page} next={list.next_page_token} to={(token) => void navigate({ to: "/nodes", search: { page: token } })} />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}

export function NodePage() {
  const { node: name } = useParams({ from: "/shell/nodes/$node" });
  const node = useGet<Node>(nodePath(name));
  const copies = useGet<Page<Allocation>>("/v1/allocations", { node: name, page_size: 200 });
  return (
    <>
      <Title above="Node" aside={node.data && <Actions of={node.data} />}>
        {name}
      </Title>
      <Loaded of={node}>
        {(n) => (
          <div className="grid gap-4">
            <Facts of={n} />
            {n.drain && !n.drain.done_at && <Left of={n} />}
            <Card title="The last 15 minutes">
              <NodeMetrics node={name} cpu={n.cpu} memory={n.memory} />
            </Card>
            <Card title="Copies" flush>
              <Loaded of={copies}>
                {(page) =>
                  page.items.length === 0 ? (
                    <Empty title="None runs here" />
                  ) : (
                    <Table
                      of="Copies"
                      rows={page.items}
                      id={(a) => a.id}
                      columns={[
                        { name: "Copy", cell: (a) => a.name },
                        { name: "Of", cell: (a) => <WorkloadLink of={a} /> },
                        { name: "State", cell: (a) => <CopyState of={a} /> },
                        { name: "Since", cell: (a) => <Ago at={a.started_at ?? a.created_at} />, wide: true },
                        { name: "Why", cell: (a) => (a.ready ? "" : (a.reason?.message ?? "")) },
                      ]}
                    />
                  )
                }
              </Loaded>
            </Card>
          </div>
        )}
      </Loaded>
    </>
  );
}

function Facts({ of }: { of: Node }) {
  const labels = Object.entries(of.labels);
  return (
    <Card>
      <div className="mb-3 flex flex-wrap items-center gap-x-4 gap-y-1">
        <Badge phase={phase(of)} />
        <span className="text-soft">
          seen <Ago at={of.last_seen} />
        </span>
        <span className="text-soft">{of.address}</span>
        <span className="text-soft">pool {of.pool}</span>
      </div>
      <dl className="grid gap-x-6 gap-y-2 sm:grid-cols-3">
        <Fact name="CPU reserved" value={`${cores(of.cpu_reserved)} of ${cores(of.cpu)}`} />
        <Fact name="Memory reserved" value={`${bytes(of.memory_reserved)} of ${bytes(of.memory)}`} />
        <Fact name="Disk free" value={`${bytes(of.disk_free ?? 0)} of ${bytes(of.disk ?? 0)}`} />
        <Fact name="System" value={`${of.kernel}, ${of.arch}, cgroup ${of.cgroup}`} />
        <Fact name="Drivers" value={of.drivers.join(", ")} />
        <Fact name="Agent" value={of.version} />
      </dl>
      {labels.length > 0 && (
        <p className="mt-3 flex flex-wrap gap-1.5">
          {labels.map(([label, value]) => (
            <span key={label} className="rounded bg-idle-soft px-1.5 py-0.5 text-xs">
              {label}={value}
            </span>
          ))}
        </p>
      )}
      {of.unenforced.length > 0 && <p className="mt-3 text-bad">Not enforced here: {of.unenforced.join(", ")}</p>}
    </Card>
  );
}

function Fact({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt className="text-xs text-soft">{name}</dt>
      <dd className="break-words">{value}</dd>
    </div>
  );
}

function Left({ of }: { of: Node }) {
  const left = of.drain?.left ?? [];
  return (
    <Card title="Being emptied" flush>
      {left.length === 0 ? (
        <Empty title="Nothing is left" />
      ) : (
        <ul className="divide-y divide-line">
          {left.map((copy) => (
            <li key={copy.copy} className="px-4 py-2">
              <span className="font-medium">{copy.copy}</span> {copy.why}
            </li>
          ))}
        </ul>
      )}
    </Card>
  );
}

function Actions({ of }: { of: Node }) {
  const path = nodePath(of.name);
  const draining = of.drain && !of.drain.done_at;
  return (
    <>
      {of.cordoned ? (
        <Act label="Uncordon" run={() => post(`${path}:uncordon`)} />
      ) : (
        <Act label="Cordon" ask={<p>It gets no new copies; those it has stay.</p>} run={() => post(`${path}:cordon`)} />
      )}
      {draining ? (
        <Act label="Cancel drain" run={() => post(`${path}:cancel-drain`)} />
      ) : (
        <Act
          label="Drain"
          look="danger"
          why={of.phase === "down" && "its copies have been started elsewhere already"}
          ask={<Preview of={of} />}
          run={(form) => post(`${path}:drain`, { deadline: String(form.get("deadline") || "1h") })}
        />
      )}
    </>
  );
}

/** Where everything would go, before anything does. */
function Preview({ of }: { of: Node }) {
  const preview = useGet<DrainPreview>(`${nodePath(of.name)}:preview-drain`);
  return (
    <>
      <Loaded of={preview}>
        {(p) =>
          p.copies.length === 0 ? (
            <p>Nothing runs there.</p>
          ) : (
            <ul className="max-h-56 space-y-1 overflow-y-auto" tabIndex={0} aria-label="What becomes of its copies">
              {p.copies.map((copy) => (
                <li key={copy.copy}>
                  <span className="font-medium">{copy.copy}</span>{" "}
                  {copy.to ? `moves to ${copy.to}` : `${copy.fate.replaceAll("_", " ")}${copy.reason ? `: ${copy.reason.message}` : ""}`}
                </li>
              ))}
            </ul>
          )
        }
      </Loaded>
      <Field label="Until when copies may take (30s, 10m, 1h)">
        <input name="deadline" defaultValue="1h" pattern="([0-9]+(ms|s|m|h|d))+" className={inputStyle} />
      </Field>
    </>
  );
}
