import { useMutation } from "@tanstack/react-query";
import { useNavigate } from "@tanstack/react-router";
import { useEffect } from "react";
import { post } from "../api/client";
import { Field, inputStyle } from "../ui/act";
import { Button, Command, Failed, Title } from "../ui/parts";

/** Also takes the whole link. */
const codeIn = (text: string) => text.trim().replace(/^.*#code=/, "");

/** Taken out of the address at once, where it would be kept. Read when the page is loaded: it is good only once. */
const given = location.hash.startsWith("#code=") ? codeIn(location.hash) : undefined;
if (given) history.replaceState(null, "", location.pathname);
let used = false;

export const hasCode = () => given !== undefined && !used;

export function LoginPage() {
  const navigate = useNavigate();
  const login = useMutation({
    mutationFn: (code: string) => post("/v1/sessions", { code }),
    onSuccess: () => navigate({ to: "/" }),
  });
  const { mutate } = login;
  useEffect(() => {
    if (given && !used) {
      used = true;
      mutate(given);
    }
  }, [mutate]);
  return (
    <main className="mx-auto grid min-h-screen max-w-md place-content-center p-6">
      <div className="rounded-2xl border border-line bg-card p-6">
        <div className="mb-4 flex items-center gap-2">
          <img src="/favicon.svg" alt="" className="size-7" />
          <span className="font-semibold">Optimus</span>
        </div>
        <Title>Log in</Title>
        <p className="mb-4 text-soft">
          On a machine that the command line is logged in on, <Command>optimus console</Command> prints a link. Open it, or paste it here.
        </p>
        <form
          className="space-y-3"
          onSubmit={(event) => {
            event.preventDefault();
            mutate(codeIn(String(new FormData(event.currentTarget).get("code") ?? "")));
          }}
        >
          <Field label="Link or code">
            <input name="code" required autoComplete="off" className={inputStyle} />
          </Field>
          <Button type="submit" look="main" className="w-full" why={login.isPending && "under way"}>
            {login.isPending ? "Logging in …" : "Log in"}
          </Button>
        </form>
        {login.isError && <Failed error={login.error} />}
      </div>
    </main>
  );
}
