//! Every field of a project file, once: for the reader, `optimus explain FIELD` and the template.

use std::fmt::Write as _;

use super::types::Kind;

/// One field. `name` is its path below a workload: `health.interval`.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    pub name: &'static str,
    /// What may be written.
    pub takes: &'static str,
    /// What stands when it is left out.
    pub default: &'static str,
    pub example: &'static str,
    pub about: &'static str,
    /// False: understood, but `deploy` refuses it as not available yet.
    pub available: bool,
}

macro_rules! fields {
    ($($name:literal, $takes:literal, $default:literal, $example:literal, $available:literal, $about:literal;)+) => {
        /// In the order a file would have them.
        pub const FIELDS: &[Field] = &[$(Field { name: $name, takes: $takes, default: $default, example: $example, about: $about, available: $available }),+];
    };
}

fields! {
    "project", "a name", "the directory's name", "project = \"shop\"", true,
        "The project the workloads belong to. At the top of the file.";
    "name", "a name", "required in a flat file", "name = \"web\"", true,
        "The workload's name in a file that holds one. Several workloads are sections instead: [service.NAME], [job.NAME], [daemon.NAME].";
    "run", "a command line, or a list of strings", "required", "run = \"python3 app.py\"", true,
        "What to start. A line is split into words and started directly; if it uses shell syntax ($ | ; & < > * ? ` ( ) and so on) it is given to `sh -c` as it is. A list of strings is always started directly. Programs are found through the workload's PATH.";
    "image", "an image reference", "none: a plain process", "image = \"registry/app:1.2\"", true,
        "Runs a container of this image instead of a process of the host. `run` is then the image's command (arguments of its entrypoint) and may be left out; a line with shell syntax is run by the container's /bin/sh instead of its entrypoint.";
    "container", "a table", "see its fields", "container = { pull = \"always\", mounts = [\"/srv/data:/data:ro\"] }", true,
        "How the container of `image` is made.";
    "container.pull", "missing, always or never", "missing", "container = { pull = \"always\" }", true,
        "When the image is fetched: if the node does not have it, before each start, or never.";
    "container.pull_timeout", "a duration, 1s to 1h", "5m", "container = { pull_timeout = \"10m\" }", true, "Longest time for fetching the image.";
    "container.auth", "the name of a registry login", "none", "container = { auth = \"company\" }", true,
        "The login the image is fetched with: the file registry-auth/NAME.json in the agent's data directory, readable by its owner alone, with `username` and `password` or `identity_token`.";
    "container.entrypoint", "a list of strings", "the image's own", "container = { entrypoint = [\"/bin/app\"] }", true, "Replaces the image's entrypoint.";
    "container.network", "bridge, host, none or a name", "bridge", "container = { network = \"host\" }", true,
        "The container's network. With bridge, or a network of that name on the node, ports are published on the host.";
    "container.ports", "a table of ports", "the same as on the host", "container = { ports = { http = 80 } }", true,
        "Where the program listens inside, by name of the port, for an image that does not look at $PORT.";
    "container.mounts", "a list of SOURCE:TARGET[:ro]", "none", "container = { mounts = [\"/srv/data:/data:ro\", \"cache:/cache\"] }", true,
        "Paths of the node, or volumes by name, seen inside. A path must exist; a volume is made when first used, belongs to the project's environment, and is never deleted by itself.";
    "dir", "a path on the node", "the directory of the file", "dir = \"/srv/web\"", true,
        "Working directory. A relative path starts at the directory of the file. In a container: an absolute path inside; left out, the image's own.";
    "env", "a table of values", "empty", "env.LOG_LEVEL = \"info\"\nenv.WORKERS = 4", true,
        "Environment of the process. It starts clean: PATH, HOME, USER, LANG, TMPDIR, then these, then PORT, PORT_<NAME> and OPTIMUS_*.";
    "user", "a user of the node", "the agent's default for workloads", "user = \"www-data\"", true,
        "Who the process runs as. In a container: one of its users, or UID:GID; left out, the image's own.";
    "copies", "0 to 10000", "what the server holds; 1 at first", "copies = 3", true,
        "How many copies run. Left out, a deploy keeps the number set by `optimus scale`.";
    "port", "\"auto\" or 1 to 65535", "none", "port = \"auto\"", true,
        "The port the process listens on. \"auto\" takes a free one of the node; the process finds it in $PORT. A number is fixed, so only one copy fits on a node.";
    "ports", "a table of ports", "none", "ports = { http = \"auto\", admin = 9000 }", true,
        "Several ports by name, instead of `port`. The first is $PORT; each is $PORT_<NAME>.";
    "health", "\"/path\", \"tcp\", \"none\" or a table", "\"tcp\" with a port, else \"none\"", "health = \"/healthz\"", true,
        "When a copy is ready. A path is asked by HTTP GET and must answer 200 to 399; redirects are not followed. Only ready copies count in a deployment.";
    "health.http", "a path", "none", "health = { http = \"/healthz\" }", true, "The path to ask by HTTP GET.";
    "health.tcp", "true", "none", "health = { tcp = true }", true, "Ready when the port accepts a connection.";
    "health.grpc", "a service name", "none", "health = { grpc = \"\" }", false, "Ready when the gRPC health protocol answers SERVING.";
    "health.command", "a command line, or a list of strings", "none", "health = { command = [\"./check\"] }", true, "Ready when the command exits 0 inside the container. Not available yet for processes.";
    "health.port", "the name of a port", "the first port", "health = { http = \"/healthz\", port = \"admin\" }", true, "Which port to ask.";
    "health.interval", "a duration", "2s", "health = { http = \"/\", interval = \"5s\" }", true,
        "Time between two checks. Until the first success a new copy is asked more often.";
    "health.timeout", "a duration", "1s", "health = { http = \"/\", timeout = \"3s\" }", true, "Longest time for one answer.";
    "health.grace", "a duration", "10s", "health = { http = \"/\", grace = \"30s\" }", true, "Failures so soon after the start do not count.";
    "health.healthy_after", "1 to 100", "1", "health = { http = \"/\", healthy_after = 2 }", true, "Successes in a row that make it good.";
    "health.unhealthy_after", "1 to 100", "3", "health = { http = \"/\", unhealthy_after = 5 }", true, "Failures in a row that make it bad.";
    "liveness", "\"/path\", \"tcp\" or a table like `health`", "none", "liveness = \"/livez\"", true,
        "When a running copy is stuck: it is restarted after `unhealthy_after` failures in a row. Takes the same table as `health`.";
    "cpu", "cores, 0.01 to 4096", "0.25", "cpu = 0.5", true, "CPU in cores: reserved when placing, and a hard limit while running.";
    "memory", "a size, or a range of sizes", "\"128M\"", "memory = \"128M..256M\"", true,
        "Memory: reserved .. limit. Above the limit the kernel kills the process (out of memory). One size is both.";
    "pids", "1 to 4194304", "512", "pids = 64", true, "Most processes and threads at a time.";
    "restart", "a table", "see its fields", "restart = { delay = \"1s\", delay_max = \"1m\" }", true,
        "What happens after an end. A service is always started again: at once the first time, then with a growing pause.";
    "restart.delay", "a duration", "1s", "restart = { delay = \"500ms\" }", true, "Pause before the second restart in a row; it doubles each time.";
    "restart.delay_max", "a duration", "1m", "restart = { delay_max = \"5m\" }", true, "Longest pause.";
    "restart.reset_after", "a duration", "1m", "restart = { reset_after = \"10m\" }", true, "Having run so long, the pauses start afresh.";
    "stop", "a table", "see its fields", "stop = { signal = \"INT\", grace = \"30s\" }", true, "How a copy is stopped.";
    "stop.signal", "TERM, INT, QUIT, HUP, USR1 or USR2", "TERM", "stop = { signal = \"QUIT\" }", true, "The signal that asks the process to stop.";
    "stop.grace", "a duration, at most 1h", "10s", "stop = { grace = \"30s\" }", true, "Time from the signal until everything is killed.";
    "update", "\"rolling\", \"canary\", \"blue-green\" or a table", "\"rolling\"", "update = { parallel = 2, deadline = \"5m\" }", true,
        "How a new release takes over. Copies are replaced a few at a time; the new one starts first, unless a fixed port forbids it. Without progress before the deadline the release that ran before comes back.";
    "update.strategy", "rolling, canary or blue-green", "rolling", "update = { strategy = \"canary\" }", true,
        "`rolling` replaces copies a few at a time. `canary` tries the release on a few copies with a share of the traffic first. `blue-green` starts a whole second set, switches all traffic at once and keeps the old set for a while.";
    "update.parallel", "1 to 1000", "1", "update = { parallel = 5 }", true, "How many copies move at a time.";
    "update.percent", "1 to 100", "none", "update = { percent = 20 }", true, "How many nodes of a daemon move at a time, in percent of those that match, rounded up; instead of `parallel`.";
    "update.deadline", "a duration", "2m", "update = { deadline = \"10m\" }", true, "Longest time without another copy becoming ready.";
    "update.min_ready", "a duration", "0s; 1s without a health check", "update = { min_ready = \"10s\" }", true, "How long a new copy must stay ready before it counts.";
    "update.max_surge", "a number of copies or a share", "as `parallel`", "update = { max_surge = \"25%\" }", true, "How many copies there may be beyond the wanted number while they move.";
    "update.max_unavailable", "a number of copies or a share", "0; as `parallel` where a new copy cannot start beside the old", "update = { max_unavailable = 1 }", true, "How many copies may be missing while they move.";
    "update.canary", "a number of copies or a share", "1", "update = { strategy = \"canary\", canary = \"10%\" }", true, "How many copies try the release first.";
    "update.steps", "a list of tables of weight and bake", "one step of 10 % for 1m", "update = { strategy = \"canary\", steps = [{ weight = 5, bake = \"1m\" }, { weight = 50, bake = \"5m\" }] }", true, "What canaries go through: `weight` percent of the traffic, for as long as `bake`. A canary that fails meanwhile brings the old release back.";
    "update.hold", "a duration", "1m", "update = { strategy = \"blue-green\", hold = \"10m\" }", true, "How long the old set stays beside the new one after the switch, so that going back takes an instant.";
    "update.auto_promote", "true or false", "true", "update = { strategy = \"canary\", auto_promote = false }", true, "Whether a release that proved itself takes over without being asked. Otherwise it waits for `optimus promote`.";
    "update.auto_rollback", "true or false", "true", "update = { auto_rollback = false }", true, "Whether the release that ran before comes back when the new one fails. Otherwise everything stays as it is, to be looked at.";
    "after", "a list of workloads", "none", "after = [\"db\"]", true,
        "A deployment begins only when these workloads of the same environment are ready.";
    "release_command", "a command line, or a table of `run` and `timeout`", "none", "release_command = \"python3 manage.py migrate\"", true,
        "Runs once per deployment, on one node, before the first copy of the new release starts. If it fails, so does the deployment, and nothing else was touched.";
    "release_command.run", "a command line, or a list of strings", "none", "release_command = { run = \"./migrate\", timeout = \"1h\" }", true, "What to run.";
    "release_command.timeout", "a duration, at most 24h", "10m", "release_command = { run = \"./migrate\", timeout = \"1h\" }", true, "Longest time it may take.";
    "disconnect", "a table", "none: copies of a silent node are lost at once", "disconnect = { lost_after = \"10m\" }", true,
        "What happens to copies on a node that does not answer. They are replaced at once; so long they may take up their place again.";
    "disconnect.lost_after", "a duration", "required", "disconnect = { lost_after = \"10m\" }", true, "From then on such a copy is lost: it stops when its node is back.";
    "disconnect.keep", "\"original\" or \"newest\"", "original", "disconnect = { lost_after = \"10m\", keep = \"newest\" }", true, "Which of two copies stays when the node is back. An original of an older release, or one that is not well, always gives way.";
    "logs", "a table", "see its fields", "logs = { size = \"64M\" }", true, "What is kept of a copy's output on its node.";
    "logs.size", "a size, at least 64K", "32M", "logs = { size = \"64M\" }", true, "Budget of one copy; the oldest goes first.";
    "secrets", "a list of names", "none", "secrets = [\"DATABASE_URL\"]", true,
        "Secrets of the environment, given to the process as variables of these names. A deployment waits until all exist (`optimus secret set DATABASE_URL`). A release keeps the versions it was deployed with.";
    "arch", "an architecture, or a list of them", "any", "arch = \"amd64\"", true, "Architectures it was built for: amd64, arm64, ... A copy runs only on nodes of one of them.";
    "constraints", "a list of rules", "none", "constraints = [\"label.zone in a, b\", \"kernel.version >= 5.10\"]", true,
        "Rules a node must meet, all of them: ATTRIBUTE OPERATOR VALUE. Attributes are `label.NAME`, `node.NAME` (arch, name, pool, cpu, memory, disk, ...) and what agents find out (`kernel.version`, `os.name`, `driver.NAME`, `attr.NAME`; see `optimus nodes`). Operators: = != < <= > >= (compared as versions; 16G is a size), ~ !~ (pattern), in, not in, contains (a list parted by commas), version (a range: `version >= 1.2, < 2`), exists, not exists.";
    "affinity", "a list of weights with rules", "none", "affinity = [\"+50 label.disk = ssd\", \"-20 label.zone = c\"]", true,
        "Rules that make a node better or worse, each after its weight from -100 to 100. A node that meets none is still taken when there is no better one.";
    "anti_affinity", "a list of workloads", "none", "anti_affinity = [\"batch\"]", true,
        "Workloads of the same project and environment whose copies are kept on other nodes, where there is a choice. Copies of one workload keep apart anyway.";
    "spread", "a list of attributes", "none", "spread = [\"label.zone\", \"label.rack r1 70%, r2 30%\"]", true,
        "Attributes over whose values the copies are spread: evenly, or by the percentages given. What they leave goes to all other values.";
    "distinct_hosts", "true or false", "false", "distinct_hosts = true", true, "At most one copy on a node.";
    "pool", "a name", "default", "pool = \"gpu\"", true, "The pool of nodes to run in; an agent states its own with `--pool`.";
    "priority", "0 to 100", "50", "priority = 80", true,
        "Higher ones are placed first. One that finds no room may displace copies at least 10 points below it: as few and as low ones as will do.";
    "disk", "a size", "none", "disk = \"10G\"", true, "Disk reserved on the node when placing.";
    "devices", "a list of kinds of devices", "none", "devices = [\"2 nvidia/gpu where memory >= 16G\"]", true,
        "Devices of the node that each copy gets for itself: [COUNT] KIND [where ATTRIBUTE OPERATOR VALUE and ...]. A kind is `gpu`, `nvidia/gpu` or `nvidia/gpu/NAME`.";
    "volumes", "a list of volumes", "none", "volumes = [\"data at /var/lib/shop\"]", true,
        "Volumes the copies use, and where they see them: NAME or NAME at /PATH. They run on the node that holds them; OPTIMUS_VOLUME_NAME says where it is seen.";
    "labels", "a table of text", "empty", "labels = { team = \"shop\" }", true, "Free labels, shown with the workload.";
    "schedule", "a cron line or a table", "none", "schedule = { cron = \"0 3 * * *\", timezone = \"Europe/Berlin\" }", true,
        "When a job runs by itself. Each run is known by the job and the instant it was due at, so none happens twice.";
    "schedule.cron", "a cron line of five fields", "required", "schedule = { cron = \"*/15 * * * *\" }", true,
        "Minute, hour, day of the month, month, day of the week. A fixed time that a clock change skips runs right after it; one that it repeats runs once.";
    "schedule.timezone", "an IANA name", "UTC", "schedule = { cron = \"0 3 * * *\", timezone = \"Europe/Berlin\" }", true, "The zone the fields are read in.";
    "schedule.overlap", "forbid, replace or allow", "forbid", "schedule = { cron = \"* * * * *\", overlap = \"replace\" }", true,
        "What happens to a run that is due while another is active: it is skipped, takes the other's place, or runs beside it.";
    "schedule.missed", "skip, run_once or run_all", "run_once", "schedule = { cron = \"0 * * * *\", missed = \"run_all\" }", true,
        "What happens to runs that were due while nobody could start them: none, the newest or all of them (at most 50) run as soon as possible.";
    "schedule.jitter", "a duration, at most 1h", "0s", "schedule = { cron = \"0 * * * *\", jitter = \"2m\" }", true, "Each run starts up to so much later, so that jobs due at one time do not start together.";
    "timeout", "a duration", "none", "timeout = \"1h\"", true, "Longest time one try of a job's run may take; then it is stopped and has failed.";
    "runs", "a table", "see its fields", "runs = { active = 2, retries = 3 }", true, "How the runs of a job are admitted, retried and remembered.";
    "runs.active", "1 to 1000", "1 with a schedule that forbids overlap, else 10", "runs = { active = 4 }", true, "How many runs may be active at the same time.";
    "runs.waiting", "0 to 1000", "100", "runs = { waiting = 0 }", true, "How many runs may wait for their turn; a further one is refused.";
    "runs.retries", "0 to 100", "0", "runs = { retries = 3 }", true, "How often a run is tried again after a copy of it failed, with the pauses of `restart`.";
    "runs.keep", "1 to 200", "20", "runs = { keep = 50 }", true, "How many ended runs are remembered.";
    "runs.on", "deploy or request", "deploy; request with a schedule or parameters", "runs = { on = \"request\" }", true, "`deploy`: each new release runs once. `request`: only `optimus run` and the schedule start it.";
    "runs.params", "a list of names", "empty", "runs = { params = [\"CUSTOMER\"] }", true, "Parameters each run must be given: `optimus run JOB -p CUSTOMER=7`. The process finds them as OPTIMUS_PARAM_<NAME>.";
    "runs.payload", "optional, required or forbidden", "optional", "runs = { payload = \"required\" }", true, "Whether a run takes a payload: `optimus run JOB --payload FILE`, at most 16 KiB. The process finds it in the file OPTIMUS_PAYLOAD_FILE.";
    "runs.start_within", "a duration", "1h", "runs = { start_within = \"10m\" }", true, "Longest time a run may wait for room on a node before it has failed.";
    "env.NAME", "a section", "none", "[env.prod]\ncopies = 5", true,
        "Overlay of an environment: [env.prod] in a flat file, [env.prod.service.web] otherwise. Its fields replace those of the workload; the tables `env` and `labels` are merged.";
}

const ALL: &[Kind] = &[Kind::Service, Kind::Job, Kind::Daemon];

impl Field {
    /// The kinds of workload that take it; none for what stands outside workloads.
    pub fn kinds(&self) -> &'static [Kind] {
        if self.name == "update.percent" {
            return &[Kind::Daemon];
        }
        match self.name.split('.').next().unwrap_or("") {
            "schedule" | "timeout" | "runs" => &[Kind::Job],
            "copies" => &[Kind::Service, Kind::Job],
            "project" => &[],
            _ => ALL,
        }
    }
}

/// A field by its path. `liveness.*` is that of `health.*`.
pub fn field(name: &str) -> Option<&'static Field> {
    let health = name.strip_prefix("liveness.").map(|rest| format!("health.{rest}"));
    let known = health.as_deref().unwrap_or(name);
    FIELDS.iter().find(|f| f.name == known)
}

/// The names, in order.
pub fn field_names() -> Vec<&'static str> {
    FIELDS.iter().map(|f| f.name).collect()
}

/// The names directly below a prefix (`""`, `"health"`).
pub(super) fn below(prefix: &str) -> Vec<&'static str> {
    FIELDS
        .iter()
        .filter_map(|f| match prefix {
            "" => (!f.name.contains('.')).then_some(f.name),
            prefix => f.name.strip_prefix(prefix)?.strip_prefix('.'),
        })
        .collect()
}

/// The documentation of a field, for people. `liveness.*` is that of `health.*`.
pub fn explain_field(name: &str) -> Option<String> {
    let field = field(name)?;
    let mut text = format!("{name}: {}\n\n{}\n\ntakes    {}\ndefault  {}\n", field.takes, field.about, field.takes, field.default);
    let kinds: Vec<&str> = field.kinds().iter().map(|k| k.word()).collect();
    if !kinds.is_empty() && kinds.len() < ALL.len() {
        let _ = writeln!(text, "only for {}", kinds.join(", "));
    }
    if !field.available {
        text.push_str("\nNot available yet: a deploy with it is refused.\n");
    }
    let _ = write!(text, "\nexample\n");
    for line in field.example.lines() {
        let _ = writeln!(text, "  {line}");
    }
    let more = below(if name == "liveness" { "health" } else { field.name });
    if !more.is_empty() {
        let _ = writeln!(text, "\nfields   {}", more.iter().map(|m| format!("{name}.{m}")).collect::<Vec<_>>().join(", "));
    }
    Some(text)
}
