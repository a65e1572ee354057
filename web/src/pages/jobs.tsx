import { Link, useNavigate, useParams, useSearch } from "@tanstack/react-router";
import { post, workloadPath } from "../api/client";
import type { Job, JobRun, Page } from "../api/types";
import { span } from "../lib/format";
import { Act } from "../ui/act";
import { linkStyle, Where } from "../ui/links";
import { Ago, Badge, Card, Command, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Scope } from "../ui/scope";
import { Pager, Table } from "../ui/table";

export function JobsPage() {
  const search = useSearch({ from: "/shell/jobs" });
  const navigate = useNavigate();
  const { project, environment, page } = search;
  const jobs = useGet<Page<Job>>("/v1/jobs", { project, environment, page_size: 100, page_token: page });
  return (
    <>
      <Title>Jobs</Title>
      <Card flush title="When they run and how they last ended" aside={<Scope of={search} to={(to) => void navigate({ to: "/jobs", search: to })} />}>
        <Loaded of={jobs} lines={5}>
          {(list) => (
            <>
              {list.items.length === 0 ? (
                <Empty title="There is no job">
                  A <code>[job.NAME]</code> section of a project file makes one; <Command>optimus explain schedule</Command>
                </Empty>
              ) : (
                <Table
                  of="Jobs"
                  rows={list.items}
                  id={(j) => `${j.project}/${j.environment}/${j.workload}`}
                  columns={[
                    {
                      name: "Name",
                      cell: (j) => (
                        <Link to="/jobs/$project/$environment/$workload" params={j} className={`${linkStyle} font-medium`}>
                          {j.workload}
                        </Link>
                      ),
                    },
                    { name: "In", cell: (j) => <Where of={j} /> },
                    { name: "Last run", cell: (j) => (j.last_run ? <Badge phase={j.last_run.phase} /> : "never") },
                    { name: "Under way", cell: (j) => j.active, wide: true, right: true },
                    { name: "Waiting", cell: (j) => j.waiting, wide: true, right: true },
                    { name: "Schedule", cell: (j) => (j.schedule ? <code>{j.schedule.cron}</code> : "on request"), wide: true },
                    { name: "Next", cell: (j) => (j.next_local ?? "") },
                  ]}
                />
              )}
              <Pager first={!page} next={list.next_page_token} to={(token) => void navigate({ to: "/jobs", search: { ...search, page: token } })} />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}

export function JobPage() {
  const key = useParams({ from: "/shell/jobs/$project/$environment/$workload" });
  const { page } = useSearch({ from: "/shell/jobs/$project/$environment/$workload" });
  const navigate = useNavigate();
  const path = workloadPath(key);
  const runs = useGet<Page<JobRun>>(`${path}/runs`, { page_size: 50, page_token: page });
  return (
    <>
      <Title
        above={<Where of={key} />}
        aside={
          <>
            <Link to="/services/$project/$environment/$workload" params={key} search={{ tab: "Logs" }} className={linkStyle}>
              Logs
            </Link>
            <Act label="Run now" look="main" ask={<p>A run is started beside the schedule.</p>} run={() => post(`${path}:run`, {})} />
          </>
        }
      >
        {key.workload}
      </Title>
      <Card title="Runs" flush>
        <Loaded of={runs} lines={5}>
          {(list) => (
            <>
              {list.items.length === 0 ? (
                <Empty title="It has not run yet" />
              ) : (
                <Table
                  of="Runs"
                  rows={list.items}
                  id={(r) => r.id}
                  columns={[
                    { name: "Run", cell: (r) => r.number },
                    { name: "State", cell: (r) => <Badge phase={r.phase} /> },
                    { name: "Began", cell: (r) => <Ago at={r.started_at ?? r.created_at} /> },
                    {
                      name: "Took",
                      cell: (r) => (r.ended_at ? span(+new Date(r.ended_at) - +new Date(r.started_at ?? r.created_at)) : ""),
                      wide: true,
                      right: true,
                    },
                    { name: "Attempts", cell: (r) => r.attempts, wide: true, right: true },
                    { name: "Why", cell: (r) => r.reason?.message ?? "" },
                    {
                      name: "",
                      cell: (r) =>
                        ["waiting", "active"].includes(r.phase) && (
                          <Act label="Cancel" look="danger" ask={<p>Run {r.number} is called off.</p>} run={() => post(`${path}/runs/${r.number}:cancel`)} />
                        ),
                    },
                  ]}
                />
              )}
              <Pager
                first={!page}
                next={list.next_page_token}
                to={(token) => void navigate({ to: "/jobs/$project/$environment/$workload", params: key, search: { page: token } })}
              />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}
