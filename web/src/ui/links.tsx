import { Link } from "@tanstack/react-router";
import type { Key } from "../api/types";

export const linkStyle = "text-accent underline-offset-2 hover:underline break-words";

export function WorkloadLink({ of }: { of: Key }) {
  const params = { project: of.project, environment: of.environment, workload: of.workload };
  return (
    <Link to="/services/$project/$environment/$workload" params={params} className={linkStyle}>
      <span className="font-medium">{of.workload}</span>
    </Link>
  );
}

/** A project's environment; production stands out by colour and shape. */
export function Where({ of }: { of: Key }) {
  const prod = /^prod/.test(of.environment);
  return (
    <span className="whitespace-nowrap text-soft">
      {of.project} / <span className={prod ? "rounded bg-bad-soft px-1 font-medium text-bad" : ""}>{of.environment}</span>
    </span>
  );
}
