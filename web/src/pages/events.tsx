import { useEffect, useRef, useState } from "react";
import type { Event, Page } from "../api/types";
import { Ago, Card, Empty, Title } from "../ui/parts";
import { Loaded, useGet } from "../ui/query";
import { inputStyle } from "../ui/act";

export function EventsPage() {
  const [filter, setFilter] = useState("");
  const input = useRef<HTMLInputElement>(null);
  const events = useGet<Page<Event>>("/v1/events", { page_size: 500 });
  useEffect(() => {
    const slash = (event: KeyboardEvent) => {
      if (event.key === "/" && !(event.target instanceof HTMLInputElement)) {
        event.preventDefault();
        input.current?.focus();
      }
    };
    addEventListener("keydown", slash);
    return () => removeEventListener("keydown", slash);
  }, []);
  const wanted = filter.toLowerCase();
  return (
    <>
      <Title>Events</Title>
      <Card
        flush
        title="The newest 500"
        aside={
          <input
            ref={input}
            aria-label="Show only events with"
            placeholder="Show only … (/)"
            value={filter}
            onChange={(event) => setFilter(event.target.value)}
            className={`${inputStyle} max-w-56`}
          />
        }
      >
        <Loaded of={events} lines={8}>
          {(page) => (
            <Feed events={page.items.toReversed().filter((e) => `${e.subject} ${e.message} ${e.kind}`.toLowerCase().includes(wanted))} />
          )}
        </Loaded>
      </Card>
    </>
  );
}

export function Feed({ events }: { events: Event[] }) {
  if (events.length === 0) return <Empty title="Nothing happened" />;
  return (
    <ol className="divide-y divide-line">
      {events.map((event) => (
        <li key={`${event.index}/${event.n}`} className="flex flex-wrap gap-x-3 px-4 py-2 text-sm">
          <span className="w-24 shrink-0 text-xs leading-6 text-soft">
            <Ago at={event.at} />
          </span>
          <span className="min-w-0 flex-1 basis-60 break-words">
            <span className="font-semibold">{event.subject}</span> {event.message}
          </span>
        </li>
      ))}
    </ol>
  );
}
