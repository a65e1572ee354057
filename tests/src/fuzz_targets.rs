//! What the fuzzer throws bytes at, and a test replays the corpus through.
//!
//! A target panics when something is wrong: on a panic below it, and on a promise broken (a value that does not
//! survive its own encoding, an error without a place). `fuzz/` includes this file by its path, so that it is built
//! with coverage without the rest of the workspace: it may use the small crates only.

use optimus_common::codec::{self, DecodeError};
use optimus_common::join_token::JoinToken;
use optimus_common::protocol::{AllocStatus, Blob, DesiredAlloc, Message, NodeFacts};
use optimus_common::reason::Reason;
use optimus_common::spec::{self, Context, Parsed, ProjectSpec, SpecErrors, WorkloadSpec};
use optimus_common::{Bytes, Millicores, Name, Span};
use optimus_core::state::{Proposal, State};
use optimus_runner::{ExitRecord, Request, RunRecord, StartFile, Status};

/// Takes bytes; panics when something is wrong.
pub type Target = fn(&[u8]);

/// Every target by its name: its directory in `fuzz/corpus` and its binary in `fuzz/fuzz_targets`.
pub const TARGETS: &[(&str, Target)] = &[
    ("frame", frame),
    ("envelope", envelope),
    ("msgpack", msgpack),
    ("spec_toml", spec_toml),
    ("spec_json", spec_json),
    ("quantities", quantities),
    ("stored", stored),
    ("join_token", join_token),
    ("runner_files", runner_files),
];

/// A frame as it comes from the network.
pub fn frame(data: &[u8]) {
    let Some((head, payload)) = data.split_first_chunk::<{ codec::FRAME_HEAD }>() else { return };
    let Ok((kind, version, length)) = codec::frame_head(*head) else { return };
    assert!(length <= codec::FRAME_MAX);
    let payload = &payload[..payload.len().min(length)];
    let Ok(message) = Message::decode(kind, version, payload) else { return };
    // Compared as bytes: a value may hold a NaN, which equals nothing.
    let again = message.encode();
    let (kind, version, _) = codec::frame_head(again[..codec::FRAME_HEAD].try_into().expect("a frame has a head")).expect("our own head");
    let back = Message::decode(kind, version, &again[codec::FRAME_HEAD..]).expect("our own frame");
    assert_eq!(back.encode(), again);
    match &message {
        Message::Desired(desired) => desired.allocs.iter().for_each(|alloc| drop(DesiredAlloc::spec(alloc))),
        Message::Report(report) => report.statuses.iter().for_each(|status| drop(status.open::<AllocStatus>())),
        Message::Hello(hello) => drop(hello.facts.open::<NodeFacts>()),
        _ => {}
    }
}

/// A record as it comes from disk. The checksum is also set right, to get behind it.
pub fn envelope(data: &[u8]) {
    let opened = codec::open_envelope(data);
    if let Ok((kind, version, payload)) = &opened {
        assert_eq!(codec::envelope_bytes(*kind, *version, payload), data);
    }
    let sealed = codec::envelope_bytes(1, 1, data);
    assert_eq!(codec::open_envelope(&sealed), Ok((1, 1, data)));
    let _ = codec::from_envelope::<ProjectSpec>(1, 1, &sealed);
    assert!(matches!(codec::from_envelope::<ProjectSpec>(2, 1, &sealed), Err(DecodeError::Unknown { kind: 1, version: 1 })));
}

/// The values inside blobs and records, behind envelope and frame.
pub fn msgpack(data: &[u8]) {
    let blob = Blob(data.to_vec());
    if let Ok(workload) = blob.open::<WorkloadSpec>() {
        let project = ProjectSpec { project: name("p"), environment: name("e"), workloads: [(name("w"), workload.clone())].into() };
        let faults = spec::check(&project);
        let _ = spec::not_available(&project);
        if faults.is_empty() {
            let again = Blob::of(&workload).open::<WorkloadSpec>().expect("our own bytes");
            assert_eq!(again, workload);
        }
    }
    if let Ok(status) = blob.open::<AllocStatus>() {
        let _ = status.reason.as_ref().map(ToString::to_string);
    }
    if let Ok(reason) = blob.open::<Reason>() {
        let _ = (reason.to_string(), reason.root().code());
    }
    let _ = blob.open::<NodeFacts>();
    let _ = blob.open::<ProjectSpec>();
}

/// A project file.
pub fn spec_toml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for environment in [None, Name::new("prod").ok()] {
        let context = Context { environment, ..context() };
        judge(spec::parse_toml("optimus.toml", text, &context), Some(text));
    }
}

/// The same as JSON.
pub fn spec_json(data: &[u8]) {
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(data) else { return };
    judge(spec::parse_json(&json, &context()), None);
    // The typed form the API takes.
    if let Ok(project) = serde_json::from_value::<ProjectSpec>(json) {
        let faults = spec::check(&project);
        if faults.is_empty() {
            let text = serde_json::to_string(&project).expect("a checked spec is JSON");
            assert_eq!(serde_json::from_str::<ProjectSpec>(&text).expect("our own JSON"), project);
        }
    }
}

/// Names, sizes, spans, cores and command lines as people write them.
pub fn quantities(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(size) = text.parse::<Bytes>() {
        assert_eq!(size.to_string().parse::<Bytes>(), Ok(size));
    }
    if let Ok(span) = text.parse::<Span>() {
        assert_eq!(span.to_string().parse::<Span>(), Ok(span));
    }
    if let Ok(cores) = text.parse::<Millicores>() {
        assert_eq!(cores.to_string().parse::<Millicores>(), Ok(cores));
    }
    if let Ok(name) = Name::new(text) {
        assert_eq!(name.as_str(), text);
    }
    if let Ok(run) = spec::parse_line(text) {
        assert!(!run.argv().is_empty() && !run.argv()[0].is_empty());
    }
}

/// What is read must hold the rules and survive its encodings; what is refused must say where and why.
fn judge(read: Result<Parsed, SpecErrors>, text: Option<&str>) {
    match read {
        Ok(parsed) => {
            assert_eq!(spec::check(&parsed.spec), [], "read, but breaks a rule");
            let json = serde_json::to_string(&parsed.spec).expect("a spec is JSON");
            assert_eq!(serde_json::from_str::<ProjectSpec>(&json).expect("our own JSON"), parsed.spec);
            let bytes = codec::to_msgpack(&parsed.spec);
            assert_eq!(codec::from_msgpack::<ProjectSpec>(&bytes).as_ref(), Ok(&parsed.spec));
        }
        Err(errors) => {
            assert!(!errors.errors.is_empty() && errors.errors.len() <= spec::ERRORS_MAX);
            let shown = errors.to_string();
            assert!(shown.starts_with("error[OPT-1001]: "), "{shown}");
            assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
            for error in &errors.errors {
                assert!(!error.message.is_empty() && error.message.len() < 4096, "{error:?}");
                if let Some(text) = text {
                    let span = error.span.as_ref().expect("an error in a file has a place");
                    assert!(span.start <= text.len(), "{error:?}");
                }
            }
        }
    }
}

fn context() -> Context {
    Context { default_project: Some(name("shop")), base_dir: "/srv/shop".into(), environment: None }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a good name")
}

/// Snapshots and commands of the log. A committed command may be strange, but never stops `apply`.
pub fn stored(data: &[u8]) {
    if let Ok(state) = State::from_bytes(data) {
        assert_eq!(State::from_bytes(&state.to_bytes()).expect("our own snapshot opens").digest(), state.digest());
    }
    if let Ok(proposal) = codec::from_msgpack::<Proposal>(data) {
        let mut state = State::default();
        let _ = state.apply(1, proposal.clone());
        let _ = state.apply(1, proposal);
        let _ = state.digest();
    }
}

/// The string an operator copies from one host to another.
pub fn join_token(data: &[u8]) {
    if let Ok(token) = JoinToken::decode(&String::from_utf8_lossy(data)) {
        let again = JoinToken::decode(&token.encode()).expect("our own token");
        assert_eq!(again.encode(), token.encode());
    }
}

/// Files and words between an agent and its runners.
pub fn runner_files(data: &[u8]) {
    if let Ok(start) = StartFile::decode(data) {
        assert_eq!(StartFile::decode(&start.encode()).ok(), Some(start));
    }
    if let Ok(run) = RunRecord::decode(data) {
        assert_eq!(RunRecord::decode(&run.encode()).ok(), Some(run));
    }
    if let Ok(exit) = ExitRecord::decode(data) {
        assert_eq!(ExitRecord::decode(&exit.encode()).ok(), Some(exit));
    }
    let text = String::from_utf8_lossy(data);
    if let Some(request) = Request::decode(&text) {
        assert_eq!(Request::decode(request.encode().trim_end()), Some(request));
    }
    if let Some(status) = Status::decode(&text) {
        assert_eq!(Status::decode(&status.encode()), Some(status));
    }
}
