/** A line over time with its limit, and the same in words for who cannot see it. */
import { useEffect, useRef } from "react";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

interface ChartProps {
  title: string;
  /** Seconds. */
  times: number[];
  values: (number | null)[];
  limit?: number | null;
  show: (value: number) => string;
}

const clock = (at: number) => new Date(at * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
const colour = (name: string) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function Chart({ title, times, values, limit, show }: ChartProps) {
  const place = useRef<HTMLDivElement>(null);
  const known = values.filter((value): value is number => value !== null);
  const now = known.at(-1);
  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const make = () => {
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
      const series: uPlot.Series[] = [
        {},
        { stroke: colour("--accent"), width: 1.5, fill: colour("--accent-soft"), spanGaps: false },
        ...(limit ? [{ stroke: colour("--bad"), width: 1, dash: [6, 4], points: { show: false } }] : []),
      ];
      const data = [times, values, ...(limit ? [times.map(() => limit)] : [])] as uPlot.AlignedData;
      const options: uPlot.Options = {
        width: element.clientWidth,
        height: 150,
        series,
        cursor: { show: false },
        legend: { show: false },
        scales: { y: { range: (_, __, most) => [0, Math.max(most, limit ?? 0, 1e-9) * 1.08] } },
        axes: [{ ...axis, values: (_, ticks) => ticks.map(clock) }, { ...axis, size: 76, values: (_, ticks) => ticks.map(show) }],
      };
      return new uPlot(options, data, element);
    };
    let plot = make();
    const again = () => {
      plot.destroy();
      plot = make();
    };
    const sizes = new ResizeObserver(() => plot.setSize({ width: element.clientWidth, height: 150 }));
    sizes.observe(element);
    const theme = new MutationObserver(again);
    theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    return () => {
      sizes.disconnect();
      theme.disconnect();
      plot.destroy();
    };
  }, [times, values, limit, show]);
  const most = known.length ? Math.max(...known) : undefined;
  const words = known.length
    ? `${title}: now ${show(now ?? 0)}, at most ${show(most ?? 0)}${limit ? `, limit ${show(limit)}` : ""}`
    : `${title}: nothing measured`;
  return (
    <figure className="min-w-0 overflow-hidden">
      <figcaption className="mb-1 flex justify-between text-xs text-soft">
        <span className="font-medium text-text">{title}</span>
        <span>
          {now === undefined ? "nothing measured" : show(now)}
          {limit ? ` of ${show(limit)}` : ""}
        </span>
      </figcaption>
      <div ref={place} role="img" aria-label={words} className="h-[150px] w-full" />
    </figure>
  );
}
