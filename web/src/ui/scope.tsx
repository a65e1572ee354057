import type { ListSearch } from "../router";
import { inputStyle } from "./act";
import { Button } from "./parts";

/** Which project and environment a list is of; it stands in the address. */
export function Scope({ of, to }: { of: ListSearch; to: (search: ListSearch) => void }) {
  return (
    <form
      key={`${of.project}/${of.environment}`}
      className="flex flex-wrap items-center gap-2"
      onSubmit={(event) => {
        event.preventDefault();
        const form = new FormData(event.currentTarget);
        const text = (name: string) => String(form.get(name) ?? "").trim() || undefined;
        to({ project: text("project"), environment: text("environment") });
      }}
    >
      <input name="project" aria-label="Project" placeholder="project" defaultValue={of.project} className={`${inputStyle} w-28!`} />
      <input name="environment" aria-label="Environment" placeholder="environment" defaultValue={of.environment} className={`${inputStyle} w-28!`} />
      <Button type="submit">Show</Button>
    </form>
  );
}
