import { type UseQueryResult, useQuery } from "@tanstack/react-query";
import type { ReactNode } from "react";
import { type Query, get } from "../api/client";
import { useLive } from "../api/live";
import { Failed, Loading } from "./parts";

/** Asked again at every change while the stream of events is there, else every few seconds. */
export function useGet<T>(path: string | undefined, query: Query = {}, everyMs?: number): UseQueryResult<T> {
  const live = useLive().state === "live";
  return useQuery({
    queryKey: [path, query],
    queryFn: ({ signal }) => get<T>(path ?? "", query, signal),
    enabled: path !== undefined,
    refetchInterval: everyMs ?? (live ? 30_000 : 3_000),
    placeholderData: (before) => before,
    retry: false,
  });
}

/** A widget fails alone: its last data stays, or the error stands in its place. */
export function Loaded<T>({ of, lines, children }: { of: UseQueryResult<T>; lines?: number; children: (data: T) => ReactNode }) {
  if (of.data !== undefined) return children(of.data);
  if (of.isError) return <Failed error={of.error} again={() => void of.refetch()} />;
  return <Loading lines={lines} />;
}
