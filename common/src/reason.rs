//! Why something is as it is. One value feeds the log, the API, the CLI and the console.
//!
//! Each reason has a stable code (`OPT-2101`), a sentence, and a hint for what to do. `optimus
//! explain CODE` prints [`Code`]. Codes are never reused.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::{Span, Timestamp};
use crate::units::{Bytes, Millicores};

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Exit {
    /// Exit status, if it left by itself.
    pub code: Option<i32>,
    /// Signal number, if it was killed.
    pub signal: Option<i32>,
    /// Set when the kernel killed a process of the copy for want of memory in this run.
    pub oom: Option<Oom>,
    pub at: Timestamp,
    /// How long it had been running.
    pub ran_for: Span,
}

/// Facts of an out-of-memory kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Oom {
    pub limit: Bytes,
    pub peak: Bytes,
    /// How many processes the kernel killed.
    pub kills: u64,
}

/// Why one node cannot take a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    NodeDown,
    Cordoned,
    Cpu {
        asked: Millicores,
        free: Millicores,
    },
    Memory {
        asked: Bytes,
        free: Bytes,
    },
    PortReserved {
        port: u16,
    },
    NoFreePort,
    DriverMissing {
        driver: String,
    },
    /// A rule of the spec and what the node has instead, if it has it at all.
    Constraint {
        rule: String,
        found: Option<String>,
    },
    Architecture {
        wanted: String,
        found: String,
    },
    Pool {
        wanted: String,
        found: String,
    },
    Disk {
        asked: Bytes,
        free: Bytes,
    },
    /// Of the devices that match, so many are free.
    Devices {
        kind: String,
        asked: u32,
        free: u32,
    },
    VolumeMissing {
        volume: String,
    },
    VolumeElsewhere {
        volume: String,
        node: String,
    },
    /// Another copy of the workload is there, and it asks for distinct hosts.
    DistinctHosts,
    /// What the project or environment may take together, on all nodes.
    Quota {
        scope: String,
        what: String,
        asked: u64,
        left: u64,
    },
}

/// How many nodes refused for one reason, for clusters too large to name each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RefusalCount {
    pub nodes: u32,
    /// The node nearest to taking it, and its refusal.
    pub nearest: NodeRefusal,
}

/// A node and why it cannot take the copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeRefusal {
    pub node: String,
    pub refusal: Refusal,
}

/// Why a copy, a deployment or a node is not (yet) as wished. Text from outside is bounded by whoever makes the value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    // placing
    NoNodes,
    NoNodeFits {
        nodes: Vec<NodeRefusal>,
        /// Instead of `nodes`, when there are many.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        counts: Vec<RefusalCount>,
    },
    /// What the project or environment may take together is taken.
    OverQuota {
        scope: String,
        what: String,
        asked: u64,
        left: u64,
    },
    /// Placed; the node has not reported yet.
    WaitingForNode {
        node: String,
    },
    NodeDown {
        node: String,
        since: Timestamp,
    },
    // starting
    CommandNotFound {
        command: String,
    },
    NotExecutable {
        command: String,
    },
    DirMissing {
        dir: String,
    },
    UserUnknown {
        user: String,
    },
    PortTaken {
        port: u16,
        holder: Option<String>,
    },
    LimitNotEnforceable {
        what: String,
        why: String,
    },
    StartFailed {
        step: String,
        error: String,
    },
    LogDiskFull {
        path: String,
        dropped_lines: u64,
    },
    Starting,
    // running
    NotReady {
        probe: String,
        last: String,
        listening: Vec<u16>,
        port: Option<u16>,
    },
    LivenessFailed {
        probe: String,
        last: String,
    },
    // ended
    Exited {
        exit: Exit,
    },
    OutOfMemory {
        exit: Exit,
        oom: Oom,
    },
    /// Ended several times in a row; the next start is at `next_start`.
    CrashLoop {
        restarts: u32,
        next_start: Timestamp,
        #[schema(no_recursion)]
        last: Box<Reason>,
    },
    /// The copy vanished without an exit record: its supervisor was killed or the host rebooted.
    ExitUnknown {
        what: String,
    },
    // wished
    StopRequested,
    Replaced {
        release: u64,
    },
    /// It gave way to a workload of higher priority.
    Preempted {
        by: String,
    },
    // deployments
    DeadlinePassed {
        deadline: Span,
        copy: Option<String>,
        #[schema(no_recursion)]
        last: Option<Box<Reason>>,
    },
    Superseded {
        by: u64,
    },
    Cancelled,
    /// It comes after a workload that is not ready.
    WaitsFor {
        workload: String,
    },
    AwaitingPromotion,
    Paused {
        since: Timestamp,
        why: Option<String>,
    },
    Baking {
        until: Timestamp,
    },
    /// Its copies are worse than those of the release before.
    AnalysisFailed {
        what: String,
    },
    /// It failed, and the release before is no other.
    NothingToGoBackTo {
        release: u64,
        #[schema(no_recursion)]
        last: Box<Reason>,
    },
    /// Somebody called it off.
    CalledOff {
        why: Option<String>,
    },
    /// The command that runs before the shift ended badly.
    ReleaseCommand {
        why: String,
    },
    /// What the workload needs is not there.
    Missing {
        what: String,
    },
    // runs of jobs, and nodes
    /// A try of a job's run took longer than its `timeout`.
    TimedOut {
        after: Span,
    },
    /// Another run of the job is active.
    RunActive {
        run: u64,
    },
    /// Its node is being emptied.
    Drained {
        node: String,
    },
    /// The daemon is not for this node, or no longer.
    NotForNode {
        node: String,
        why: Refusal,
    },
    /// The command that runs before the first copy starts is at work.
    ReleaseCommandRuns {
        node: String,
        release: u64,
    },
    /// What a copy printed last before it came to this.
    LastLine {
        #[schema(no_recursion)]
        reason: Box<Reason>,
        line: String,
    },
    // nodes
    /// The node's container engine does not answer; its copies are shown as last seen.
    EngineDown {
        error: String,
    },
}

/// The registered facts of one code.
#[derive(Debug, Clone, Copy)]
pub struct Code {
    pub code: &'static str,
    pub title: &'static str,
    /// What it means and what to do, for `optimus explain CODE` and `docs/errors/`.
    pub about: &'static str,
}

macro_rules! codes {
    ($($id:ident = $code:literal, $title:literal, $about:literal;)+) => {
        /// The codes, by name.
        pub mod code {
            use super::Code;
            $(pub const $id: Code = Code { code: $code, title: $title, about: $about };)+
        }
        /// Every code, in order.
        pub const CODES: &[Code] = &[$(code::$id),+];
    };
}

codes! {
    NO_NODES = "OPT-2001", "no node to run on",
        "No agent has joined the cluster. Start one with `optimus agent --join TOKEN`, or use `optimus dev`.";
    NO_NODE_FITS = "OPT-2002", "no node can take the copy",
        "Each node was refused for the reason listed. Lower what the workload asks for (`cpu`, `memory`), free room, or add a node.";
    WAITING_FOR_NODE = "OPT-2003", "waiting for the node's first report",
        "The copy is placed and its node has been told. If this lasts, look at the node: `optimus nodes`.";
    NODE_DOWN = "OPT-2004", "the node is not answering",
        "The agent on the node has not been heard of. Its copies keep running there; they are shown as last seen.";
    OVER_QUOTA = "OPT-2005", "quota reached",
        "The project or environment already reserves what its quota allows, so no further copy is placed, whatever room nodes have. Scale something down, or have the quota raised.";
    COMMAND_NOT_FOUND = "OPT-2101", "command not found",
        "The program in `run` is not on the node, neither in the workload's PATH nor at the path given. Install it there, or correct `run`.";
    NOT_EXECUTABLE = "OPT-2102", "command is not executable",
        "The file in `run` exists but may not be executed by the workload's user: set its mode (`chmod +x`), or start it through its interpreter.";
    DIR_MISSING = "OPT-2103", "directory missing",
        "The workload's directory is not on the node, or its user may not enter it. `dir` is a path on the node.";
    USER_UNKNOWN = "OPT-2104", "unknown user",
        "The user in `user` does not exist on the node. Create it there, or remove the field.";
    PORT_TAKEN = "OPT-2105", "port already in use on the host",
        "Another process listens on the port. A dynamic port moves by itself; a fixed one waits until it is free. Stop the holder or choose another port.";
    LIMIT_NOT_ENFORCEABLE = "OPT-2106", "a limit cannot be enforced on this node",
        "The workload asks for a limit the node's kernel or cgroup set-up cannot give, so it was not started. Run the agent as root (or with a delegated cgroup), or use `optimus dev`, which runs on and says what is not enforced.";
    START_FAILED = "OPT-2107", "the process could not be started",
        "A step of the start failed; the step and the system's error are given.";
    LOG_DISK_FULL = "OPT-2108", "log disk is full",
        "The disk that holds the agent's data is full. The workload keeps running; its output is dropped and counted until there is room.";
    STARTING = "OPT-2109", "starting",
        "The process has been started; its readiness check has not passed yet.";
    ENGINE_DOWN = "OPT-2110", "container engine not answering",
        "The container engine of the node (Docker, Podman) is not running or does not answer. Copies that run are shown as last seen and are taken up again when it returns; new ones wait for it. Start it on the node: `systemctl start docker`.";
    NOT_READY = "OPT-2201", "readiness check fails",
        "The process runs but its readiness check does not pass: the last answer is given, with the ports it really listens on. Most often it listens on another port than $PORT, or on the wrong path.";
    LIVENESS_FAILED = "OPT-2202", "restarted after failed liveness checks",
        "The liveness check failed too often in a row, so the copy was restarted.";
    EXITED = "OPT-2301", "the process ended",
        "The process left by itself or was killed by a signal. Its last lines are in `optimus logs`.";
    OUT_OF_MEMORY = "OPT-2302", "out of memory",
        "The copy reached its memory limit and the kernel killed it. Raise `memory`, or look for a leak: the peak is given.";
    CRASH_LOOP = "OPT-2303", "crash loop",
        "The process ended several times soon after its start. The pause between starts doubles each time; the cause of the last end is given.";
    EXIT_UNKNOWN = "OPT-2304", "ended without an exit record",
        "The copy's supervisor was killed, or the host restarted, so how the process ended is not known. It is started again.";
    STOP_REQUESTED = "OPT-2401", "stopped on request",
        "Somebody stopped or scaled down the workload.";
    REPLACED = "OPT-2402", "replaced by another release",
        "A deployment moved this copy's place to another release.";
    PREEMPTED = "OPT-2403", "displaced by a higher priority",
        "A workload at least 10 priority points above this one found no room elsewhere, so this copy was stopped and waits for room. Add a node, lower what workloads ask for, or raise `priority`.";
    DEADLINE_PASSED = "OPT-2501", "deployment made no progress in time",
        "No further copy became ready within the deployment's deadline. The copy named and its last reason say why. An update goes back to the release that ran before; a first deployment leaves its copies for you to look at.";
    SUPERSEDED = "OPT-2502", "superseded by a newer deployment",
        "A newer deploy of the same workload took over.";
    CANCELLED = "OPT-2503", "cancelled", "Somebody stopped or removed the workload while it was being deployed.";
    WAITS_FOR = "OPT-2510", "waiting for another workload",
        "The workload is to come after another one that is not ready. Its deployment begins when that is, and fails if that takes longer than its deadline.";
    AWAITING_PROMOTION = "OPT-2511", "waiting for promotion",
        "The new release proved itself; `auto_promote` is off, so somebody has to say `optimus promote`. There is no deadline.";
    PAUSED = "OPT-2512", "paused", "Somebody paused the deployment; `optimus resume` lets it go on. Deadlines stand still meanwhile.";
    BAKING = "OPT-2513", "baking", "The new release has its share of the traffic and must go on well until the time given.";
    ANALYSIS_FAILED = "OPT-2514", "worse than the release before",
        "What the new copies showed under traffic is worse than what is allowed, or than the release before shows at the same time.";
    NOTHING_TO_GO_BACK_TO = "OPT-2515", "nothing to go back to",
        "The release failed, and the one before has the very same spec, so going back would change nothing. The copies were left for you to look at.";
    CALLED_OFF = "OPT-2516", "called off", "Somebody aborted the deployment or rolled it back.";
    RELEASE_COMMAND = "OPT-2517", "the release command failed",
        "`release_command` runs once before the first copy of a release starts. It ended badly or took too long, so nothing else was touched.";
    MISSING = "OPT-2518", "something it needs is missing", "The detail says what. The deployment begins when it is there.";
    RELEASE_COMMAND_RUNS = "OPT-2519", "the release command runs",
        "`release_command` runs once before the first copy of a release starts; the deployment goes on when it has ended well. Its output: `optimus logs WORKLOAD-release`.";
    RUN_TIMED_OUT = "OPT-2601", "the run took too long",
        "A try of the job's run was stopped because it took longer than `timeout`. Give it more time, or look at its last lines for what it waits for.";
    RUN_ACTIVE = "OPT-2602", "another run is active",
        "The job's schedule forbids that runs overlap, or as many runs as `runs.active` allows are active: this one waits or is skipped.";
    DRAINED = "OPT-2603", "moved off a node that is being emptied",
        "Somebody drains the copy's node. It is placed elsewhere as soon as there is room.";
    NOT_FOR_NODE = "OPT-2604", "the daemon is not for this node",
        "A daemon runs on the nodes that match it; this one does not, or no longer.";
    INVALID_SPEC = "OPT-1001", "the project file is not valid",
        "The place and the cause are given. `optimus explain FIELD` documents each field.";
    NOT_AVAILABLE_YET = "OPT-1002", "not available yet",
        "The field is understood but this version does not act on it yet, so the deploy is refused rather than doing something else. Remove the field.";
    BAD_REQUEST = "OPT-1101", "malformed request", "The request could not be read; the detail says where.";
    UNAUTHENTICATED = "OPT-1102", "not authenticated",
        "The request carries no valid credential. The CLI reads the token written by `optimus server` or `optimus dev`; see `optimus help credentials`.";
    FORBIDDEN = "OPT-1103", "not allowed", "The credential does not carry the permission the route needs.";
    NOT_FOUND = "OPT-1104", "not found", "Nothing of that name is here.";
    METHOD_NOT_ALLOWED = "OPT-1105", "method not allowed", "The path exists, the method does not; `Allow` lists what does.";
    UNSUPPORTED_MEDIA = "OPT-1106", "unsupported media type", "Send `Content-Type: application/json`.";
    TOO_LARGE = "OPT-1107", "request too large", "The body is larger than the limit given.";
    TIMED_OUT = "OPT-1108", "request timed out", "The request took longer than its limit. Writes may have taken effect: read before you repeat, or repeat with the same Idempotency-Key.";
    CONFLICT = "OPT-1109", "conflict", "The state changed or does not allow this; the detail says what.";
    NO_LEADER = "OPT-1110", "no leader", "The control plane has no leader at the moment; try again after the time given.";
    INTERNAL = "OPT-1111", "internal error", "A fault of ours. The request id finds it in the server's log.";
    HOST_NOT_ALLOWED = "OPT-1112", "host or origin not allowed", "The Host or Origin header is not one this server answers to. Add it with `--allow-host`.";
    OVERLOADED = "OPT-1113", "too many requests at once", "The server's queue is full. Try again after the time given.";
    GONE = "OPT-1114", "no longer kept", "What was asked for has left the window the server keeps. Start again from the current state: leave out `since`, or read the list afresh.";
    BEHIND = "OPT-1115", "server is behind", "This server does not have the state asked for yet. Try again after the time given, or ask another server.";
    TOKEN_REFUSED = "OPT-1201", "join token refused", "The token is wrong, expired, used up or revoked. Make a new one with `optimus nodes join-token`.";
    NODE_REFUSED = "OPT-1202", "node refused",
        "The node's certificate is not one this cluster accepts: the node was removed, its key is not the one on record, or the certificate belongs to another cluster or role. What runs on the node keeps running. Join it again with a new token from `optimus nodes join-token`.";
    CERTIFICATE_EXPIRED = "OPT-1203", "certificate expired",
        "The node's certificate has expired. An agent renews by itself, up to 400 days after expiry, with the key it joined with; check the clocks of both hosts if this lasts. Later, join the node again with a new token.";
    PROTOCOL_MISMATCH = "OPT-1204", "no common protocol version",
        "Agent and server speak no common version of the protocol. An agent may be one release behind the servers: upgrade the older side.";
    UNREACHABLE = "OPT-1301", "server not reachable", "Nothing answered at the address. Is `optimus server` or `optimus dev` running?";
}

impl Reason {
    /// The registered code of this reason.
    pub fn code(&self) -> &'static Code {
        use Reason::*;
        match self {
            NoNodes => &code::NO_NODES,
            NoNodeFits { .. } => &code::NO_NODE_FITS,
            OverQuota { .. } => &code::OVER_QUOTA,
            WaitingForNode { .. } => &code::WAITING_FOR_NODE,
            NodeDown { .. } => &code::NODE_DOWN,
            CommandNotFound { .. } => &code::COMMAND_NOT_FOUND,
            NotExecutable { .. } => &code::NOT_EXECUTABLE,
            DirMissing { .. } => &code::DIR_MISSING,
            UserUnknown { .. } => &code::USER_UNKNOWN,
            PortTaken { .. } => &code::PORT_TAKEN,
            LimitNotEnforceable { .. } => &code::LIMIT_NOT_ENFORCEABLE,
            StartFailed { .. } => &code::START_FAILED,
            LogDiskFull { .. } => &code::LOG_DISK_FULL,
            Starting => &code::STARTING,
            NotReady { .. } => &code::NOT_READY,
            LivenessFailed { .. } => &code::LIVENESS_FAILED,
            Exited { .. } => &code::EXITED,
            OutOfMemory { .. } => &code::OUT_OF_MEMORY,
            CrashLoop { .. } => &code::CRASH_LOOP,
            ExitUnknown { .. } => &code::EXIT_UNKNOWN,
            StopRequested => &code::STOP_REQUESTED,
            Replaced { .. } => &code::REPLACED,
            Preempted { .. } => &code::PREEMPTED,
            DeadlinePassed { .. } => &code::DEADLINE_PASSED,
            Superseded { .. } => &code::SUPERSEDED,
            Cancelled => &code::CANCELLED,
            WaitsFor { .. } => &code::WAITS_FOR,
            AwaitingPromotion => &code::AWAITING_PROMOTION,
            Paused { .. } => &code::PAUSED,
            Baking { .. } => &code::BAKING,
            AnalysisFailed { .. } => &code::ANALYSIS_FAILED,
            NothingToGoBackTo { .. } => &code::NOTHING_TO_GO_BACK_TO,
            CalledOff { .. } => &code::CALLED_OFF,
            ReleaseCommand { .. } => &code::RELEASE_COMMAND,
            Missing { .. } => &code::MISSING,
            TimedOut { .. } => &code::RUN_TIMED_OUT,
            RunActive { .. } => &code::RUN_ACTIVE,
            Drained { .. } => &code::DRAINED,
            NotForNode { .. } => &code::NOT_FOR_NODE,
            EngineDown { .. } => &code::ENGINE_DOWN,
            ReleaseCommandRuns { .. } => &code::RELEASE_COMMAND_RUNS,
            LastLine { reason, .. } => reason.code(),
        }
    }

    /// The cause at the bottom: what a crash loop or a missed deadline stands on.
    pub fn root(&self) -> &Reason {
        match self {
            Reason::CrashLoop { last, .. } | Reason::DeadlinePassed { last: Some(last), .. } => last.root(),
            Reason::NothingToGoBackTo { last, .. } => last.root(),
            Reason::LastLine { reason, .. } => reason.root(),
            other => other,
        }
    }

    /// Whether the state it explains is a wished or passing one, not a fault.
    pub fn is_calm(&self) -> bool {
        matches!(
            self,
            Reason::Starting
                | Reason::WaitingForNode { .. }
                | Reason::StopRequested
                | Reason::Replaced { .. }
                | Reason::Preempted { .. }
                | Reason::Superseded { .. }
                | Reason::Cancelled
                | Reason::WaitsFor { .. }
                | Reason::AwaitingPromotion
                | Reason::Paused { .. }
                | Reason::Baking { .. }
                | Reason::CalledOff { .. }
                | Reason::RunActive { .. }
                | Reason::ReleaseCommandRuns { .. }
                | Reason::Drained { .. }
                | Reason::NotForNode { .. }
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NodeDown => write!(f, "node is down"),
            Refusal::Cordoned => write!(f, "node is cordoned"),
            Refusal::Cpu { asked, free } => write!(f, "cpu: asks for {asked} cores, {free} free"),
            Refusal::Memory { asked, free } => write!(f, "memory: asks for {}, {} free", asked.human(), free.human()),
            Refusal::PortReserved { port } => write!(f, "port {port} is reserved by another copy"),
            Refusal::NoFreePort => write!(f, "no free port in the node's dynamic range"),
            Refusal::DriverMissing { driver } => write!(f, "node has no {driver} driver"),
            Refusal::Constraint { rule, found: Some(found) } => write!(f, "wants {rule}; it is {found}"),
            Refusal::Constraint { rule, found: None } => write!(f, "wants {rule}; the node does not have it"),
            Refusal::Architecture { wanted, found } => write!(f, "built for {wanted}; the node is {found}"),
            Refusal::Pool { wanted, found } => write!(f, "wants pool {wanted}; the node is in {found}"),
            Refusal::Disk { asked, free } => write!(f, "disk: asks for {}, {} free", asked.human(), free.human()),
            Refusal::Devices { kind, asked, free } => write!(f, "devices: asks for {asked} {kind}, {free} free"),
            Refusal::VolumeMissing { volume } => write!(f, "there is no volume {volume}"),
            Refusal::VolumeElsewhere { volume, node } => write!(f, "volume {volume} is on {node}"),
            Refusal::DistinctHosts => write!(f, "a copy of the workload is there, and it asks for distinct hosts"),
            Refusal::Quota { scope, what, asked, left } => {
                let shown = |n: &u64| match what.as_str() {
                    "cpu" => format!("{} cores", Millicores(u32::try_from(*n).unwrap_or(u32::MAX))),
                    "memory" | "disk" => Bytes(*n).human(),
                    _ => n.to_string(),
                };
                write!(f, "quota of {scope}: asks for {} {what}, {} left", shown(asked), shown(left))
            }
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exited with status {code}")?,
            (None, Some(signal)) => write!(f, "killed by {}", signal_name(signal))?,
            (None, None) => write!(f, "ended")?,
        }
        write!(f, " after {}", rounded(self.ran_for))
    }
}

/// A span fit for reading: whole seconds from ten seconds on.
fn rounded(span: Span) -> Span {
    if span.0 >= 10_000 { Span(span.0 / 1000 * 1000) } else { span }
}

/// `SIGKILL` for 9; the number for those without a common name.
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Reason::*;
        match self {
            NoNodes => write!(f, "no node has joined the cluster"),
            NoNodeFits { nodes, counts } => {
                write!(f, "no node can take it")?;
                for (i, RefusalCount { nodes, nearest: NodeRefusal { node, refusal } }) in counts.iter().enumerate() {
                    let lead = if i == 0 { ":" } else { ";" };
                    match nodes {
                        1 => write!(f, "{lead} {node}: {refusal}")?,
                        _ => write!(f, "{lead} {nodes} nodes: {refusal} (the nearest, {node})")?,
                    }
                }
                for (i, NodeRefusal { node, refusal }) in nodes.iter().enumerate() {
                    write!(f, "{} {node}: {refusal}", if i == 0 { ":" } else { ";" })?;
                }
                Ok(())
            }
            OverQuota { scope, what, asked, left } => {
                let refusal = Refusal::Quota { scope: scope.clone(), what: what.clone(), asked: *asked, left: *left };
                write!(f, "{refusal}")
            }
            WaitingForNode { node } => write!(f, "waiting for {node} to report"),
            NodeDown { node, since } => write!(f, "node {node} has not answered since {since}"),
            CommandNotFound { command } => write!(f, "command `{command}` not found on the node"),
            NotExecutable { command } => write!(f, "`{command}` may not be executed by the workload's user"),
            DirMissing { dir } => write!(f, "directory {dir} is missing on the node or may not be entered"),
            UserUnknown { user } => write!(f, "user `{user}` does not exist on the node"),
            PortTaken { port, holder: Some(holder) } => write!(f, "port {port} is taken by {holder}"),
            PortTaken { port, holder: None } => write!(f, "port {port} is taken by another process"),
            LimitNotEnforceable { what, why } => write!(f, "cannot enforce {what}: {why}"),
            StartFailed { step, error } => write!(f, "failed to {step}: {error}"),
            LogDiskFull { path, dropped_lines } => write!(f, "log disk at {path} is full; {dropped_lines} lines dropped"),
            Starting => write!(f, "starting"),
            NotReady { probe, last, listening, port } => {
                write!(f, "{probe} not passing: {last}")?;
                match port {
                    Some(port) if !listening.contains(port) => match listening.as_slice() {
                        [] => write!(f, "; it listens on no port, PORT is {port}"),
                        ports => {
                            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                            write!(f, "; it listens on {}, PORT is {port}", ports.join(", "))
                        }
                    },
                    _ => Ok(()),
                }
            }
            LivenessFailed { probe, last } => write!(f, "{probe} failed: {last}"),
            Exited { exit } => write!(f, "{exit}"),
            OutOfMemory { oom, exit } => write!(
                f,
                "out of memory: killed at its limit of {} (peak {}) after {}",
                oom.limit.human(),
                oom.peak.human(),
                rounded(exit.ran_for)
            ),
            CrashLoop { restarts, next_start, last } => {
                write!(f, "crash loop: {restarts} restarts, next start at {next_start}; {last}")
            }
            ExitUnknown { what } => write!(f, "ended without an exit record: {what}"),
            StopRequested => write!(f, "stopped on request"),
            Preempted { by } => write!(f, "displaced by {by}, which has a higher priority"),
            Replaced { release } => write!(f, "replaced by release {release}"),
            DeadlinePassed { deadline, copy, last } => {
                write!(f, "no progress for {deadline}")?;
                if let Some(copy) = copy {
                    write!(f, "; {copy}")?;
                }
                if let Some(last) = last {
                    write!(f, ": {last}")?;
                }
                Ok(())
            }
            Superseded { by } => write!(f, "superseded by release {by}"),
            Cancelled => write!(f, "cancelled"),
            WaitsFor { workload } => write!(f, "waiting for {workload} to be ready"),
            AwaitingPromotion => write!(f, "waiting for promotion"),
            Paused { since, why: None } => write!(f, "paused since {since}"),
            Paused { since, why: Some(why) } => write!(f, "paused since {since}: {why}"),
            Baking { until } => write!(f, "has to go on well until {until}"),
            AnalysisFailed { what } => write!(f, "{what}"),
            NothingToGoBackTo { release, last } => {
                write!(f, "{last}; release {release} before it has the same spec, so there is nothing to go back to")
            }
            CalledOff { why: None } => write!(f, "called off"),
            CalledOff { why: Some(why) } => write!(f, "called off: {why}"),
            ReleaseCommand { why } => write!(f, "the release command failed: {why}"),
            Missing { what } => write!(f, "{what}"),
            TimedOut { after } => write!(f, "took longer than its timeout of {after}"),
            RunActive { run } => write!(f, "run {run} is active"),
            Drained { node } => write!(f, "node {node} is being drained"),
            NotForNode { node, why } => write!(f, "not for node {node}: {why}"),
            EngineDown { error } => write!(f, "the node's container engine does not answer: {error}"),
            ReleaseCommandRuns { node, release } => write!(f, "the release command of release {release} runs on {node}"),
            LastLine { reason, line } => write!(f, "{reason}; its last line: {line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_well_formed() {
        let mut seen = std::collections::BTreeSet::new();
        for code in CODES {
            assert!(seen.insert(code.code), "{} is used twice", code.code);
            assert!(code.code.starts_with("OPT-") && code.code.len() == 8, "{}", code.code);
            assert!(!code.about.is_empty());
        }
    }
}
