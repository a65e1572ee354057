/** Names for what the API's document describes. */
import type { components } from "./schema";

type Schemas = components["schemas"];
export type Status = Schemas["ClusterStatus"];
export type Workload = Schemas["Workload"];
export type Allocation = Schemas["Allocation"];
export type Deployment = Schemas["Deployment"];
export type Explanation = Schemas["Explanation"];
export type Node = Schemas["Node"];
export type Event = Schemas["Event"];
export type Job = Schemas["Job"];
export type JobRun = Schemas["JobRun"];
export type Secret = Schemas["Secret"];
export type Cluster = Schemas["ClusterView"];
export type History = Schemas["MetricHistory"];
export type LogRecord = Schemas["LogRecord"];
export type DrainPreview = Schemas["DrainPreview"];
export type Reason = Schemas["ReasonView"];
export type Problem = Schemas["Problem"];
export type Key = Schemas["WorkloadKey"];

export interface Page<T> {
  items: T[];
  index: number;
  next_page_token?: string | null;
}
