import { useMemo } from "react";
import { nodePath, workloadPath } from "../api/client";
import type { Allocation, History, Key, Page } from "../api/types";
import { bytes, cores } from "../lib/format";
import { inputStyle } from "../ui/act";
import { Chart } from "../ui/chart";
import { Card, Empty } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";

const EVERY_MS = 5_000;
const QUERY = { metrics: "cpu,memory_working", from: "15m", step: "5s" };

export function CopyMetrics({ of, copy, choose }: { of: Key; copy?: string; choose: (copy: string) => void }) {
  const copies = useGet<Page<Allocation>>(`${workloadPath(of)}/allocations`);
  return (
    <Loaded of={copies}>
      {({ items }) => {
        const shown = items.find((a) => a.name === copy) ?? items[0];
        if (!shown) return <Empty title="There is no copy to measure" />;
        return (
          <Card
            title="The last 15 minutes"
            aside={
              <select aria-label="Copy" value={shown.name} onChange={(event) => choose(event.target.value)} className={`${inputStyle} w-auto!`}>
                {[...new Set(items.map((a) => a.name))].map((name) => (
                  <option key={name}>{name}</option>
                ))}
              </select>
            }
          >
            <Charts
              path={`${workloadPath(of)}/allocations/${encodeURIComponent(shown.name)}/metrics`}
              cpu={shown.limits?.cpu}
              memory={shown.limits?.memory_limit}
            />
          </Card>
        );
      }}
    </Loaded>
  );
}

export function NodeMetrics({ node, cpu, memory }: { node: string; cpu: number; memory: number }) {
  return <Charts path={`${nodePath(node)}/metrics`} cpu={cpu} memory={memory} />;
}

function Charts({ path, cpu, memory }: { path: string; cpu?: number; memory?: number }) {
  const history = useGet<History>(path, QUERY, EVERY_MS);
  return <Loaded of={history}>{(data) => <Drawn of={data} cpu={cpu} memory={memory} />}</Loaded>;
}

function Drawn({ of, cpu, memory }: { of: History; cpu?: number; memory?: number }) {
  const { times, used, held } = useMemo(() => {
    const series = (metric: string) => of.series.find((s) => s.metric === metric);
    const [c, m] = [series("cpu"), series("memory_working")];
    const start = new Date(of.from).getTime() / 1000;
    const step = milliseconds(of.step) / 1000;
    return {
      times: (c?.mean ?? m?.mean ?? []).map((_, i) => start + i * step),
      // Thousandths of a core.
      used: (c?.mean ?? []).map((value) => (value === null ? null : value / 1000)),
      held: m?.mean ?? [],
    };
  }, [of]);
  return (
    <div className="grid gap-6 lg:grid-cols-2">
      <Chart title="CPU" times={times} values={used} limit={cpu} show={cores} />
      <Chart title="Memory in use" times={times} values={held} limit={memory} show={bytes} />
    </div>
  );
}

/** `1m30s`, `5s`, `250ms` as the API writes a length of time. */
export function milliseconds(text: string): number {
  const unit: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
  return [...text.matchAll(/(\d+)(ms|[smhd])/g)].reduce((sum, [, n, name]) => sum + Number(n) * (unit[name ?? ""] ?? 0), 0);
}
