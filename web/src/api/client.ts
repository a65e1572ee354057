/** Asking the API: one place for errors, sessions that have ended, and repeated writes. */
import type { Key, Problem } from "./types";

export class ApiError extends Error {
  constructor(readonly problem: Problem) {
    super(problem.detail || problem.title);
  }
}

export type Query = Record<string, string | number | boolean | undefined | null>;

let onLoggedOut: () => void = () => {};
/** Called when the API no longer knows the session. */
export function whenLoggedOut(then: () => void) {
  onLoggedOut = then;
}

export function withQuery(path: string, query: Query = {}) {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const text = new URLSearchParams(pairs.map(([name, value]) => [name, String(value)])).toString();
  return text ? `${path}?${text}` : path;
}

export async function problemOf(response: Response): Promise<Problem> {
  const unknown: Problem = {
    type: "",
    title: `the server answered ${response.status}`,
    status: response.status,
    detail: "",
    code: "",
    request_id: response.headers.get("x-request-id") ?? "",
    errors: [],
    retryable: response.status >= 500,
  };
  try {
    return { ...unknown, ...((await response.json()) as Partial<Problem>) };
  } catch {
    return unknown;
  }
}

async function ask<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const headers: Record<string, string> = { accept: "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (method !== "GET") headers["idempotency-key"] = crypto.randomUUID();
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (!response.ok) {
    if (response.status === 401 && path !== "/v1/sessions") onLoggedOut();
    throw new ApiError(await problemOf(response));
  }
  return (response.status === 204 ? undefined : await response.json()) as T;
}

export const get = <T>(path: string, query?: Query, signal?: AbortSignal) => ask<T>("GET", withQuery(path, query), undefined, signal);
export const post = <T>(path: string, body?: unknown) => ask<T>("POST", path, body);
export const put = <T>(path: string, body: unknown) => ask<T>("PUT", path, body);
export const remove = <T>(path: string) => ask<T>("DELETE", path);

const seg = encodeURIComponent;
export const workloadPath = (key: Key) => `/v1/projects/${seg(key.project)}/envs/${seg(key.environment)}/workloads/${seg(key.workload)}`;
export const nodePath = (node: string) => `/v1/nodes/${seg(node)}`;
