#!/usr/bin/env python3
"""Simulated nodes: many copies on many nodes, and how long the copies of a lost node are missing. No root needed.

OPTIMUS_BIN names a directory with `optimus` and `agents-sim` to measure; unset, they are built. OPTIMUS_BENCH_KEEP=1
keeps the servers' logs.

usage: scripts/bench nodes [--json] [--nodes 1000] [--copies 100000] [--losses 10] [--part place|lost|leader|all]

  place    one server: all nodes join, all copies are placed and run; time, memory and CPU of the server
  lost     one server: a node loses power; time until all its copies run elsewhere, from the moment of the loss
  leader   three servers: the same, and the leader is killed in the same moment

The agents are agents-sim: real QUIC, certificates and joins, one process for all of them; copies are played. Server and
agents share the cores, so times are upper bounds; the server's own CPU is given beside them.
"""
import argparse, contextlib, json, os, shutil, signal, socket, ssl, statistics, subprocess, sys, tempfile, time, urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
BIN = os.environ.get("OPTIMUS_BIN", os.path.join(TARGET, "bench-fast"))
PATIENCE = 900.0
# Copies of one workload the state accepts.
COPIES_MAX = 10_000
TICKS = os.sysconf("SC_CLK_TCK")


def say(text):
    print(text, file=sys.stderr, flush=True)


def wait_for(what, condition, patience=PATIENCE, pause=0.05):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(pause)
    raise SystemExit(f"bench: gave up waiting for {what}")


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid, key="VmRSS"):
    with open(f"/proc/{pid}/status") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith(key + ":")) / 1024


class Servers:
    """One or three servers in a directory of their own."""

    def __init__(self, count):
        self.dir = tempfile.mkdtemp(prefix="optimus-bench-")
        self.env = dict(os.environ, HOME=self.dir, XDG_CONFIG_HOME=self.dir + "/config", XDG_DATA_HOME=self.dir + "/data", NO_COLOR="1", LC_ALL="C")
        self.servers, self.apis, self.count = [], [], count

    def run(self, *args):
        done = subprocess.run([BIN + "/optimus", *args], env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench: optimus {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def launch(self, token=None):
        n = len(self.servers)
        api, agents = free_port(), free_port(socket.SOCK_DGRAM)
        # Each with a home of its own: a server writes the context that clients use.
        env = self.env if n == 0 else dict(self.env, XDG_CONFIG_HOME=f"{self.dir}/config-{n}")
        args = ["server", "--data-dir", f"{self.dir}/server-{n}", "--api-listen", f"127.0.0.1:{api}", "--agent-listen", f"127.0.0.1:{agents}"]
        args += ["--advertise", f"127.0.0.1:{agents}"] + ([f"--join={token}"] if token else [])
        log = open(f"{self.dir}/server-{n}.log", "w")
        self.servers.append(subprocess.Popen([BIN + "/optimus", *args], env=env, stdout=log, stderr=log))
        self.apis.append(f"127.0.0.1:{api}")

    def __enter__(self):
        self.launch()
        wait_for("the server", lambda: subprocess.run([BIN + "/optimus", "status"], env=self.env, capture_output=True).returncode == 0)
        name = open(self.dir + "/config/optimus/current").read().strip()
        context = json.load(open(f"{self.dir}/config/optimus/contexts/{name}.json"))
        self.token = context["token"]
        self.tls = ssl.create_default_context(cadata=context["ca_pem"])
        for n in range(1, self.count):
            self.launch(self.call("POST", "/v1/join-tokens", dict(role="server", uses=1))["token"])
            voting = lambda: [s for s in self.get("/v1/cluster")["servers"] if s["alive"] and s["role"] in ("leader", "voter")]
            wait_for(f"server {n} to vote", lambda: len(voting()) == n + 1)
        return self

    def __exit__(self, *_):
        for p in self.servers:
            p.terminate()
        for p in self.servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(10)
            p.kill()
        if os.environ.get("OPTIMUS_BENCH_KEEP"):
            say(f"kept {self.dir}")
        else:
            shutil.rmtree(self.dir, ignore_errors=True)

    def call(self, method, path, body=None, server=0):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://{self.apis[server]}{path}", method=method, data=data)
        request.add_header("Authorization", "Bearer " + self.token)
        request.add_header("Content-Type", "application/json")
        request.add_header("Idempotency-Key", f"bench-{time.monotonic_ns()}")
        with urllib.request.urlopen(request, context=self.tls, timeout=60) as answer:
            return json.load(answer)

    def get(self, path, server=0):
        return self.call("GET", path, server=server)

    def leader(self):
        leads = next(s for s in self.get("/v1/cluster")["servers"] if s["role"] == "leader")
        return self.apis.index(leads["api"])

    def deploy(self, copies, tag=""):
        """In workloads as large as the state accepts, one after the other: each is an order of its own."""
        for n in range(0, (copies + COPIES_MAX - 1) // COPIES_MAX):
            name, count = f"load{tag}-{n}", min(COPIES_MAX, copies - n * COPIES_MAX)
            folder = f"{self.dir}/{name}"
            os.makedirs(folder, exist_ok=True)
            with open(folder + "/optimus.toml", "w") as f:
                f.write(f'project = "bench"\nname = "{name}"\nrun = ["sleep", "100000"]\ncopies = {count}\ncpu = 0.01\nmemory = "1M"\n[update]\ndeadline = "30m"\n')
            self.call("POST", "/v1/deploy", json.loads(self.run("validate", folder, "--json")))


class Agents:
    """agents-sim, ordered about over its standard input."""

    def __init__(self, servers, nodes):
        token = servers.call("POST", "/v1/join-tokens", dict(uses=nodes))["token"]
        self.log = open(servers.dir + "/agents.log", "w")
        args = [BIN + "/agents-sim", "--join", token, "--agents", str(nodes), "--dir", servers.dir + "/agents"]
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench: agents-sim ended")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"bench: agents-sim: {answer['error']}")
        return answer

    def order(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line):
        self.order(line)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.order("quit")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()


def bench_place(args):
    with Servers(1) as servers, Agents(servers, args.nodes) as agents:
        server = servers.servers[0].pid
        began = time.monotonic()
        agents.answer()
        agents.ask(f"wait {args.nodes} connected")
        yield f"{args.nodes} nodes joined and connected", "s", time.monotonic() - began
        time.sleep(3)
        yield f"server RSS, {args.nodes} nodes, nothing deployed", "MB", rss_mb(server)
        yield "agents RSS per node", "KB", rss_mb(agents.process.pid) * 1024 / args.nodes
        yield from idle(server, f"{args.nodes} nodes, nothing deployed")
        before, at = cpu_seconds(server), time.monotonic()
        servers.deploy(args.copies)
        agents.ask(f"wait {args.copies} running")
        took = time.monotonic() - at
        yield f"{args.copies} copies placed and running", "s", took
        yield "placements, committed and seen by agents", "/s", args.copies / took
        wait_for("all copies to be known as ready", lambda: servers.get("/v1/status")["copies_ready"] == args.copies, pause=0.2)
        yield "until the server knows all of them ready", "s", time.monotonic() - at
        yield "server CPU for all of it", "s", cpu_seconds(server) - before
        status = agents.ask("status")
        yield "desired sets sent per copy", "", status["sets"] / args.copies
        yield "copies in them per copy placed", "", status["set_copies"] / args.copies
        time.sleep(3)
        yield f"server RSS, {args.nodes} nodes and {args.copies} copies", "MB", rss_mb(server)
        yield "server RSS, peak", "MB", rss_mb(server, "VmHWM")
        yield "agents RSS per node", "KB", rss_mb(agents.process.pid) * 1024 / args.nodes
        yield from idle(server, f"{args.nodes} nodes and {args.copies} copies")
        at = time.monotonic()
        servers.deploy(1, tag="-one")
        agents.ask(f"wait {args.copies + 1} running")
        yield f"one copy more, beside {args.copies}", "s", time.monotonic() - at


def idle(server, what):
    seconds = 15
    before = cpu_seconds(server)
    time.sleep(seconds)
    yield f"server CPU, {what}", "% of a core", 100 * (cpu_seconds(server) - before) / seconds


def losses(servers, agents, args, kill_leader):
    first, last = [], []
    for n in range(args.losses if not kill_leader else 1):
        agents.order(f"lose {n}")
        killed = agents.answer()
        if kill_leader:
            servers.servers[kill_leader[0]].kill()
        lost = agents.answer()
        say(f"  lost {killed}: {lost}")
        first.append(lost["first_ms"] / 1000)
        last.append(lost["last_ms"] / 1000)
        agents.ask(f"restart {n}")
        agents.ask(f"wait {args.nodes} connected")
        if not kill_leader:
            time.sleep(1)
    return first, last


def report(what, first, last):
    yield f"{what}: first copy running elsewhere, median", "s", statistics.median(first)
    yield f"{what}: all copies running elsewhere, median", "s", statistics.median(last)
    yield f"{what}: all copies running elsewhere, longest of {len(last)}", "s", max(last)


def bench_lost(args):
    with Servers(1) as servers, Agents(servers, args.nodes) as agents:
        agents.answer()
        agents.ask(f"wait {args.nodes} connected")
        copies = min(args.copies, 10 * args.nodes)
        servers.deploy(copies)
        agents.ask(f"wait {copies} running")
        first, last = losses(servers, agents, args, None)
        yield from report(f"node lost, 1 server, {args.nodes} nodes, {copies} copies", first, last)


def bench_leader(args):
    first, last = [], []
    for _ in range(args.losses):
        with Servers(3) as servers, Agents(servers, args.nodes) as agents:
            agents.answer()
            agents.ask(f"wait {args.nodes} connected")
            copies = min(args.copies, 10 * args.nodes)
            servers.deploy(copies)
            agents.ask(f"wait {copies} running")
            time.sleep(2)
            a, b = losses(servers, agents, args, [servers.leader()])
            first += a
            last += b
    yield from report(f"node and leader lost, 3 servers, {args.nodes} nodes, {copies} copies", first, last)


PARTS = {"place": bench_place, "lost": bench_lost, "leader": bench_leader}


def main(argv, build=lambda: None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=100_000)
    parser.add_argument("--losses", type=int, default=10)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    args = parser.parse_args(argv)
    if "OPTIMUS_BIN" not in os.environ:
        build()
    rows = []
    for name, bench in PARTS.items():
        if args.part in (name, "all"):
            for metric, unit, value in bench(args):
                rows.append((metric, unit, value))
                say(f"  {metric}: {value:.3f} {unit}")
                if args.json:
                    print(json.dumps(dict(bench="nodes", metric=metric, unit=unit, ours=round(value, 4))), flush=True)
    if not args.json:
        print("| metric | unit | value |\n|---|---|---|")
        for metric, unit, value in rows:
            print(f"| {metric} | {unit} | {value:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
