import { useNavigate, useSearch } from "@tanstack/react-router";
import type { Page, Workload } from "../api/types";
import { Where, WorkloadLink } from "../ui/links";
import { Ago, Badge, Card, Command, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Scope } from "../ui/scope";
import { Pager, Table } from "../ui/table";

export function ServicesPage() {
  const search = useSearch({ from: "/shell/services" });
  const navigate = useNavigate();
  const { project, environment, page } = search;
  const workloads = useGet<Page<Workload>>("/v1/workloads", { project, environment, page_size: 100, page_token: page });
  return (
    <>
      <Title>Services</Title>
      <Card flush title="Services, daemons and jobs" aside={<Scope of={search} to={(to) => void navigate({ to: "/services", search: to })} />}>
        <Loaded of={workloads} lines={6}>
          {(list) => (
            <>
              {list.items.length === 0 ? (
                <Empty title={project || environment ? "None here" : "Nothing is deployed yet"}>
                  Write a project file with <Command>optimus init</Command>, then <Command>optimus deploy</Command>
                </Empty>
              ) : (
                <Table
                  of="Services"
                  rows={list.items}
                  id={(w) => `${w.project}/${w.environment}/${w.workload}`}
                  columns={[
                    { name: "Name", cell: (w) => <WorkloadLink of={w} /> },
                    { name: "In", cell: (w) => <Where of={w} /> },
                    { name: "Kind", cell: (w) => w.spec.kind, wide: true },
                    { name: "State", cell: (w) => <Badge phase={w.phase} /> },
                    { name: "Ready", cell: (w) => <Health of={w} /> },
                    { name: "Release", cell: (w) => w.release, wide: true, right: true },
                    { name: "Restarts", cell: (w) => w.restarts, wide: true, right: true },
                    { name: "Changed", cell: (w) => <Ago at={w.updated_at} />, wide: true },
                  ]}
                />
              )}
              <Pager
                first={!page}
                next={list.next_page_token}
                to={(token) => void navigate({ to: "/services", search: { ...search, page: token } })}
              />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}

const CELLS_MAX = 20;

/** A cell for each copy, as long as they can be told apart. */
function Health({ of }: { of: Workload }) {
  const { copies_ready: ready, copies_wanted: wanted } = of;
  return (
    <span className="inline-flex items-center gap-2 whitespace-nowrap" title={`${ready} of ${wanted} copies are ready`}>
      {wanted <= CELLS_MAX && (
        <span aria-hidden="true" className="hidden gap-0.5 sm:inline-flex">
          {Array.from({ length: wanted }, (_, i) => (
            <span key={i} className={`h-3 w-1.5 rounded-sm ${i < ready ? "bg-good" : "bg-bad"}`} />
          ))}
        </span>
      )}
      {ready} of {wanted}
    </span>
  );
}
