/** Doing something: a question first where it matters, the refusal shown where it was asked. */
import { useMutation, useQueryClient } from "@tanstack/react-query";
import { type ReactNode, useEffect, useId, useRef, useState } from "react";
import { Button, Failed } from "./parts";

interface ActProps {
  label: string;
  look?: "plain" | "main" | "danger";
  why?: string | false;
  /** What it does, in the dialog. Without one it is done at once. */
  ask?: ReactNode;
  run: (form: FormData) => Promise<unknown>;
  then?: () => void;
}

export function Act({ label, look, why, ask, run, then }: ActProps) {
  const [open, setOpen] = useState(false);
  const dialog = useRef<HTMLDialogElement>(null);
  const client = useQueryClient();
  const title = useId();
  const doing = useMutation({
    mutationFn: run,
    onSuccess: () => {
      setOpen(false);
      void client.invalidateQueries();
      then?.();
    },
    onError: () => setOpen(true),
  });
  useEffect(() => {
    if (open) dialog.current?.showModal();
  }, [open]);
  return (
    <>
      <Button look={look} why={why} onClick={() => (ask ? setOpen(true) : doing.mutate(new FormData()))}>
        {doing.isPending ? "…" : label}
      </Button>
      {open && (
        <dialog
          ref={dialog}
          aria-labelledby={title}
          onClose={() => {
            setOpen(false);
            doing.reset();
          }}
          className="m-auto w-[min(32rem,calc(100vw-2rem))] rounded-xl border border-line bg-card p-0 text-text shadow-xl"
        >
          <form
            onSubmit={(event) => {
              event.preventDefault();
              // A second click finds it under way.
              if (!doing.isPending) doing.mutate(new FormData(event.currentTarget));
            }}
          >
            <h2 id={title} className="border-b border-line px-5 py-3 font-semibold">
              {label}
            </h2>
            <div className="space-y-3 px-5 py-4">{ask}</div>
            {doing.isError && <Failed error={doing.error} />}
            <div className="flex justify-end gap-2 border-t border-line px-5 py-3">
              <Button onClick={() => dialog.current?.close()}>Cancel</Button>
              <Button type="submit" look={look === "danger" ? "danger" : "main"} why={doing.isPending && "under way"} autoFocus>
                {label}
              </Button>
            </div>
          </form>
        </dialog>
      )}
    </>
  );
}

export function Field({ label, children }: { label: string; children: ReactNode }) {
  return (
    <label className="block">
      <span className="mb-1 block text-xs font-medium text-soft">{label}</span>
      {children}
    </label>
  );
}

export const inputStyle = "w-full min-h-9 rounded-lg border border-line bg-bg px-3 py-1 text-sm";
