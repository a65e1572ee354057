import { useNavigate, useSearch } from "@tanstack/react-router";
import { put, remove } from "../api/client";
import type { Page, Secret } from "../api/types";
import { Act, Field, inputStyle } from "../ui/act";
import { Where } from "../ui/links";
import { Ago, Card, Command, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { Scope } from "../ui/scope";
import { Pager, Table } from "../ui/table";

const path = (project: string, environment: string, name: string) =>
  `/v1/projects/${encodeURIComponent(project)}/envs/${encodeURIComponent(environment)}/secrets/${encodeURIComponent(name)}`;

export function SecretsPage() {
  const search = useSearch({ from: "/shell/secrets" });
  const navigate = useNavigate();
  const { project, environment, page } = search;
  const secrets = useGet<Page<Secret>>("/v1/secrets", { project, environment, page_size: 100, page_token: page });
  return (
    <>
      <Title aside={<SetSecret project={project} environment={environment} />}>Secrets</Title>
      <Card flush title="Values are given to copies and shown to nobody" aside={<Scope of={search} to={(to) => void navigate({ to: "/secrets", search: to })} />}>
        <Loaded of={secrets} lines={5}>
          {(list) => (
            <>
              {list.items.length === 0 ? (
                <Empty title="There is no secret">
                  A service that names one in <code>secrets</code> starts only with it. <Command>optimus secret set NAME</Command>
                </Empty>
              ) : (
                <Table
                  of="Secrets"
                  rows={list.items}
                  id={(s) => `${s.project}/${s.environment}/${s.name}`}
                  columns={[
                    { name: "Name", cell: (s) => <span className="font-medium break-all">{s.name}</span> },
                    { name: "In", cell: (s) => <Where of={{ ...s, workload: "" }} /> },
                    { name: "Version", cell: (s) => s.version, right: true },
                    { name: "Read by", cell: (s) => s.readers.map((r) => `${r.workload} (${r.version ?? "none"})`).join(", "), wide: true },
                    { name: "Set", cell: (s) => <Ago at={s.created_at} />, wide: true },
                    {
                      name: "",
                      cell: (s) => (
                        <span className="flex flex-wrap justify-end gap-2">
                          <SetSecret project={s.project} environment={s.environment} name={s.name} />
                          <Act
                            label="Remove"
                            look="danger"
                            ask={
                              <>
                                <p>{s.name} is removed with all its versions. Copies that run keep what they were given.</p>
                                <Field label={`Type ${s.name} to go on`}>
                                  <input name="name" required pattern={s.name} autoComplete="off" className={inputStyle} />
                                </Field>
                              </>
                            }
                            run={() => remove(path(s.project, s.environment, s.name))}
                          />
                        </span>
                      ),
                    },
                  ]}
                />
              )}
              <Pager first={!page} next={list.next_page_token} to={(token) => void navigate({ to: "/secrets", search: { ...search, page: token } })} />
            </>
          )}
        </Loaded>
      </Card>
    </>
  );
}

function SetSecret({ project, environment, name }: { project?: string; environment?: string; name?: string }) {
  return (
    <Act
      label={name ? "New version" : "Set a secret"}
      look={name ? "plain" : "main"}
      ask={
        <>
          {[
            ["project", project],
            ["environment", environment],
            ["name", name],
          ].map(([field, value]) => (
            <Field key={field} label={field ?? ""}>
              <input name={field} defaultValue={value} readOnly={name !== undefined} required className={inputStyle} />
            </Field>
          ))}
          <Field label="value">
            <textarea name="value" required rows={3} autoComplete="off" spellCheck={false} className={`${inputStyle} font-mono`} />
          </Field>
          <label className="flex items-center gap-2">
            <input type="checkbox" name="restart" /> replace the copies that read it, a few at a time
          </label>
        </>
      }
      run={(form) => {
        const text = (field: string) => String(form.get(field) ?? "");
        const body = { value: text("value"), restart: form.get("restart") === "on" };
        return put(path(text("project"), text("environment"), text("name")), body);
      }}
    />
  );
}
