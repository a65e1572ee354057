"""Consensus beside etcd: `scripts/bench raft`. Imported by scripts/bench.

Both sides run on one disk, take turns, and are driven by one client with the same messages (optimus-raft-bench).
Everything it starts it stops again.
"""
import json, os, shutil, signal, socket, ssl, statistics, subprocess, sys, tempfile, time, urllib.request

PATIENCE = 60.0
IN_FLIGHT = (1, 64, 512)
# Above this the machine is busy with something else: wait for a calmer moment, but no longer than the caller says.
CALM_LOAD = 1.5


def say(text):
    print(text, file=sys.stderr, flush=True)


def wait_for(what, condition, patience=PATIENCE, pause=0.02):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise SystemExit(f"bench: gave up waiting for {what}")


def free_ports(kind, n):
    sockets = [socket.socket(socket.AF_INET, kind) for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def load_now():
    with open("/proc/loadavg") as f:
        return float(f.read().split()[0])


def calm(patience):
    """Waits at most so many seconds until the machine has little else to do, and gives the load."""
    end = time.monotonic() + patience
    while load_now() > CALM_LOAD and time.monotonic() < end:
        time.sleep(2)
    return load_now()


class Servers:
    """Processes in one directory, killed at the end."""

    def __init__(self, n, base):
        self.dir = tempfile.mkdtemp(prefix="raft-bench-", dir=base)
        self.n, self.processes = n, []

    def spawn(self, *args, env=None):
        log = open(f"{self.dir}/{len(self.processes)}.log", "w")
        self.processes.append(subprocess.Popen(args, stdout=log, stderr=log, env=env))
        log.close()

    def log(self, i):
        with open(f"{self.dir}/{i}.log") as f:
            return f.read()

    def alive(self):
        for i, p in enumerate(self.processes):
            if p.poll() is not None:
                raise SystemExit(f"bench: a server ended:\n{self.log(i)[-2000:]}")

    def pids(self):
        return [p.pid for p in self.processes if p.poll() is None]

    def kill(self, i):
        self.processes[i].kill()
        self.processes[i].wait()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def endpoints(self, first):
        """All of them, one first."""
        return ",".join(self.doors[first:] + self.doors[:first])


class Ours(Servers):
    name = "optimus"

    def __init__(self, n, base, tool):
        super().__init__(n, base)
        self.tool = tool

    def start(self):
        subprocess.run([self.tool, "certs", self.dir + "/certs", str(self.n)], check=True)
        peers = ",".join(f"127.0.0.1:{p}" for p in free_ports(socket.SOCK_DGRAM, self.n))
        self.doors = [f"127.0.0.1:{p}" for p in free_ports(socket.SOCK_STREAM, self.n)]
        for number in range(1, self.n + 1):
            self.spawn(self.tool, "node", f"{self.dir}/{number}", self.dir + "/certs", str(number), peers, ",".join(self.doors))
        self.leader()

    def leader(self):
        def find():
            lead = [i for i, p in enumerate(self.processes) if p.poll() is None and self.said(i) == "leads"]
            return lead and [lead[0]]
        return wait_for("a leader of ours", find)[0]

    def said(self, i):
        lines = [line for line in self.log(i).splitlines() if line in ("leads", "follows")]
        return lines[-1] if lines else ""

    def hand_over(self, i):
        self.processes[i].send_signal(signal.SIGUSR1)


class Etcd(Servers):
    name = "etcd"

    def start(self):
        self.doors = [f"127.0.0.1:{p}" for p in free_ports(socket.SOCK_STREAM, self.n)]
        peers = [f"http://127.0.0.1:{p}" for p in free_ports(socket.SOCK_STREAM, self.n)]
        cluster = ",".join(f"m{i}={url}" for i, url in enumerate(peers))
        for i in range(self.n):
            client = "http://" + self.doors[i]
            self.spawn("etcd", "--name", f"m{i}", "--data-dir", f"{self.dir}/{i}", "--listen-client-urls", client, "--advertise-client-urls", client,
                       "--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i], "--initial-cluster", cluster,
                       "--initial-cluster-state", "new", "--log-level", "error")
        wait_for("etcd", lambda: self.control("put", "ready", "1") is not None, pause=0.2)

    def control(self, *args):
        env = dict(os.environ, ETCDCTL_API="3")
        done = subprocess.run(["etcdctl", "--endpoints", ",".join(self.doors), "--command-timeout=2s", *args], env=env, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    def status(self):
        return json.loads(self.control("endpoint", "status", "-w", "json") or "[]")

    def leader(self):
        def find():
            for e in self.status():
                if e["Status"]["leader"] == e["Status"]["header"]["member_id"]:
                    return [self.doors.index(e["Endpoint"])]
        return wait_for("a leader of etcd", find)[0]

    def hand_over(self, i):
        other = [e for e in self.status() if e["Endpoint"] != self.doors[i]][0]["Status"]["header"]["member_id"]
        env = dict(os.environ, ETCDCTL_API="3")
        subprocess.run(["etcdctl", "--endpoints", self.doors[i], "move-leader", f"{other:x}"], env=env, capture_output=True, check=True)


def run(args):
    return json.loads(subprocess.run([str(a) for a in args], check=True, capture_output=True, text=True).stdout)


def middle(rounds):
    """The median of each figure over the rounds."""
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def throughput(tool, base, runs, seconds, patience):
    """Rows of durable writes, ours and etcd's in turn."""
    for n in (1, 3):
        with Ours(n, base, tool) as ours, Etcd(n, base) as etcd:
            figures = {}
            for r in range(runs):
                for c in IN_FLIGHT:
                    # Who goes first changes.
                    for side in ((ours, etcd), (etcd, ours))[r % 2]:
                        load = calm(patience)
                        got = run([tool, "load", side.doors[side.leader()], c, seconds, *side.pids()])
                        say(f"  {n} servers, {c} in flight, {side.name}: {got['per_second']:.0f}/s, p50 {got['p50_us']} us, p99 {got['p99_us']} us, "
                            f"CPU {got['cpu_us']:.0f} us a write, {got['errors']} errors (load {load:.1f})")
                        figures.setdefault((c, side.name), []).append(dict(got, load=load))
            for c in IN_FLIGHT:
                yield n, c, middle(figures[c, "optimus"]), middle(figures[c, "etcd"])


def disk(tool, base, seconds=2):
    return {how: run([tool, "disk", base, seconds, how]) for how in ("append", "fallocate", "written")}


def gaps(tool, base, trials, make, planned, patience, writers=16):
    """Longest times without an acknowledged write when the leader is killed, or hands over."""
    found = []
    for trial in range(trials):
        calm(patience)
        with make() as side:
            leader = side.leader()
            time.sleep(1)
            doors = side.doors if planned else [d for i, d in enumerate(side.doors) if i != leader]
            load = subprocess.Popen([tool, "gap", ",".join(doors), str(writers), "5"], stdout=subprocess.PIPE, text=True)
            time.sleep(2)
            side.hand_over(leader) if planned else side.kill(leader)
            out, _ = load.communicate()
            found.append(json.loads(out)["gap_ms"])
            say(f"  {side.name}, leader {'hands over' if planned else 'killed'}, trial {trial + 1}: {out.strip()}")
    return found


class Product(Servers):
    """Three `optimus server` processes."""
    name = "optimus server"

    def __init__(self, n, base, optimus):
        super().__init__(n, base)
        self.optimus = optimus

    def env(self, i):
        home = f"{self.dir}/home{i}"
        os.makedirs(home, exist_ok=True)
        return dict(os.environ, HOME=home, XDG_CONFIG_HOME=home + "/config", XDG_DATA_HOME=home + "/data", NO_COLOR="1")

    def cli(self, i, *args, check=True):
        done = subprocess.run([self.optimus, *args], env=self.env(i), capture_output=True, text=True)
        if done.returncode and check:
            raise SystemExit(f"bench: optimus {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout if done.returncode == 0 else None

    def start(self):
        self.api = free_ports(socket.SOCK_STREAM, self.n)
        udp = free_ports(socket.SOCK_DGRAM, self.n)
        for i in range(self.n):
            join = ["--join", json.loads(self.cli(0, "cluster", "join-token", "--json"))["token"]] if i else []
            self.spawn(self.optimus, "server", "--data-dir", f"{self.dir}/{i}", "--api-listen", f"127.0.0.1:{self.api[i]}",
                       "--agent-listen", f"127.0.0.1:{udp[i]}", *join, env=self.env(i))
            wait_for(f"server {i + 1}", lambda: self.alive() or self.cli(i, "status", check=False) is not None, pause=0.1)
        wait_for("three voters", lambda: len(self.voters()) == self.n, pause=0.2)

    def scale(self, tool, seconds, runs, patience):
        """Rows of scales through the leader's API, each writer its own workload."""
        base = "/v1/projects/bench/envs/dev/workloads"
        os.makedirs(self.dir + "/w0")
        with open(self.dir + "/w0/optimus.toml", "w") as f:
            f.write('project = "bench"\nname = "w0"\nrun = ["/bin/true"]\ncopies = 1\n')
        with open(self.credentials()) as f:
            context = json.load(f)
        body = json.loads(self.cli(0, "validate", self.dir + "/w0", "--json"))
        tls = ssl.create_default_context(cadata=context["ca_pem"])
        for n in range(max(IN_FLIGHT)):
            one = json.dumps(body).replace('"w0"', f'"w{n}"').encode()
            request = urllib.request.Request(context["url"] + "/v1/deploy", method="POST", data=one)
            request.add_header("Authorization", "Bearer " + context["token"])
            request.add_header("Content-Type", "application/json")
            urllib.request.urlopen(request, context=tls, timeout=60).close()
        rows = []
        for c in IN_FLIGHT:
            rounds = []
            for _ in range(runs):
                calm(patience)
                got = run([tool, "api", context["url"] + base, self.credentials(), c, seconds, *self.pids()])
                say(f"  API, {c} in flight: {got['per_second']:.0f}/s, p50 {got['p50_us']} us, CPU {got['cpu_us']:.0f} us, {got['errors']} errors")
                rounds.append(got)
            rows.append((c, middle(rounds)))
        return rows

    def members(self):
        return json.loads(self.cli(0, "cluster", "members", "--json"))

    def voters(self):
        found = self.members()
        servers = found["servers"] if isinstance(found, dict) else found
        return [s for s in servers if s["role"] in ("leader", "voter")]

    def credentials(self):
        folder = f"{self.dir}/home0/config/optimus"
        with open(folder + "/current") as f:
            return f"{folder}/contexts/{f.read().strip()}.json"


def ticks(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def memory_mb(pid, key):
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith(key + ":")) / 1024


def idle(side, seconds):
    """Memory and CPU of each process at rest."""
    time.sleep(3)
    before = {p: ticks(p) for p in side.pids()}
    time.sleep(seconds)
    hz = os.sysconf("SC_CLK_TCK")
    return [dict(rss=memory_mb(p, "Rss"), pss=memory_mb(p, "Pss"), cpu=100.0 * (ticks(p) - t) / hz / seconds) for p, t in before.items()]


def cells(*values):
    return "| " + " | ".join(str(v) for v in values) + " |"


def whole(value):
    return f"{value:,.0f}"


def ratio(a, b):
    return f"{a / b:.2f}" if b else "-"


def gap_text(found):
    return f"{statistics.median(found):.0f} / {max(found):.0f} ms"


def bench(binaries, args):
    """Prints the tables; with --json one object a line."""
    tool, optimus, base = binaries + "/optimus-raft-bench", binaries + "/optimus", args.dir
    seconds, runs = args.seconds, args.runs
    lines, began = [], load_now()

    def table(title, *head):
        lines.extend(["", f"**{title}**", "", cells(*head), "|" + "---|" * len(head)])

    def figure(metric, unit, ours, peer=None):
        if args.json:
            row = dict(bench="raft", metric=metric, unit=unit, ours=ours, peer=peer, peer_name="etcd", ratio=ours / peer if peer else None)
            print(json.dumps(row), flush=True)

    limit = disk(tool, base)
    say("  disk: " + ", ".join(f"{how} {d['per_second']:.0f} fdatasync/s (p50 {d['p50_us']} us)" for how, d in limit.items()))
    table("Durable writes of 256 bytes", "servers", "in flight", "ours/s", "etcd/s", "ratio", "ours p50 / p99 ms", "etcd p50 / p99 ms",
          "CPU us a write, ours / etcd")
    for n, c, ours, etcd in throughput(tool, base, runs, seconds, args.calm):
        ms = lambda g: f"{g['p50_us'] / 1000:.2f} / {g['p99_us'] / 1000:.1f}"
        lines.append(cells(n, c, whole(ours["per_second"]), whole(etcd["per_second"]), ratio(ours["per_second"], etcd["per_second"]), ms(ours), ms(etcd),
                           f"{ours['cpu_us']:.0f} / {etcd['cpu_us']:.0f}"))
        for key in ("per_second", "p50_us", "p99_us", "cpu_us", "errors"):
            figure(f"{n} servers, {c} in flight, {key}", key, ours[key], etcd[key])
    again = disk(tool, base)
    for how in limit:
        (a, b) = (limit[how], again[how])
        lines.append(cells("disk", 1, f"{whole(a['per_second'])} before, {whole(b['per_second'])} after", "", "", f"{a['p50_us'] / 1000:.2f} / {a['p99_us'] / 1000:.1f}",
                           "", f"4 KiB and fdatasync, {how}"))
        figure(f"disk, {how}", "fdatasync/s", a["per_second"])

    with Product(3, base, optimus) as product:
        resting = idle(product, args.idle)
        api = product.scale(tool, seconds, runs, args.calm)
    with Etcd(3, base) as etcd:
        peer = idle(etcd, args.idle)
    table("Three `optimus server` processes: scaling workloads over HTTPS, connections kept", "in flight", "scales/s", "p50 / p99 ms", "CPU us each, all servers", "errors")
    for c, got in api:
        lines.append(cells(c, whole(got["per_second"]), f"{got['p50_us'] / 1000:.2f} / {got['p99_us'] / 1000:.1f}", whole(got["cpu_us"]), whole(got["errors"])))
        figure(f"API, {c} in flight", "per_second", got["per_second"])
    table(f"At rest, each of three servers, {args.idle} s", "", "RSS MB", "PSS MB", "% of a core")
    for name, found in (("optimus server", resting), ("etcd", peer)):
        lines.append(cells(name, *(", ".join(f"{s[key]:.{digits}f}" for s in found) for key, digits in (("rss", 0), ("pss", 0), ("cpu", 2)))))
    for key, unit in (("rss", "MB"), ("pss", "MB"), ("cpu", "% of a core")):
        figure(f"at rest, {key}, worst server", unit, max(s[key] for s in resting), max(s[key] for s in peer))

    table("Longest time without an acknowledged write, 16 writers", "", "ours, median / worst", "etcd, median / worst", "trials")
    for planned, what in ((False, "leader killed"), (True, "planned hand-over")):
        ours = gaps(tool, base, args.trials, lambda: Ours(3, base, tool), planned, args.calm)
        etcd = gaps(tool, base, min(args.trials, args.peer_trials), lambda: Etcd(3, base), planned, args.calm)
        lines.append(cells(what, gap_text(ours), gap_text(etcd), f"{len(ours)}, etcd {len(etcd)}"))
        figure(f"{what}, median", "ms", statistics.median(ours), statistics.median(etcd))
        figure(f"{what}, worst", "ms", max(ours), max(etcd))
    lines.append("")
    lines.append(f"Load average {began:.1f} at the start, {load_now():.1f} at the end; {os.cpu_count()} cores, kernel {os.uname().release}; "
                 f"medians of {runs} rounds of {seconds} s.")
    if not args.json:
        print("\n".join(lines))
