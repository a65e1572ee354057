//! What each fuzz target does with its bytes. One place for the fuzzer (`fuzz/`) and for the replay of the corpus
//! in the test run. A target may refuse its input in any way but a panic, and what it accepts must survive the
//! round trip.

use std::path::PathBuf;

use optimus_common::codec::{self, FRAME_HEAD};
use optimus_common::join_token::JoinToken;
use optimus_common::protocol::{AllocStatus, Blob, Message, NodeFacts};
use optimus_common::spec::{self, Context, ProjectSpec, WorkloadSpec};
use optimus_common::{Bytes, Millicores, Name, Span};
use optimus_core::state::{Proposal, State};
use optimus_runner::{ExitRecord, Request, RunRecord, StartFile, Status};

pub type Target = fn(&[u8]);

/// Every target by name; each has a folder of that name in `fuzz/corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("frames", frames),
    ("blobs", blobs),
    ("stored", stored),
    ("spec_toml", spec_toml),
    ("spec_json", spec_json),
    ("join_token", join_token),
    ("runner_files", runner_files),
    ("quantities", quantities),
];

/// Frames of the agent and join protocols, as they come from the network.
pub fn frames(bytes: &[u8]) {
    let Some(head) = bytes.get(..FRAME_HEAD).and_then(|h| <[u8; FRAME_HEAD]>::try_from(h).ok()) else { return };
    let Ok((kind, version, length)) = codec::frame_head(head) else { return };
    let Some(payload) = bytes.get(FRAME_HEAD..FRAME_HEAD.saturating_add(length)) else { return };
    if let Ok(message) = Message::decode(kind, version, payload) {
        let again = message.encode();
        let (kind, version, _) = codec::frame_head(again[..FRAME_HEAD].try_into().expect("a frame has a head")).expect("our own frame");
        // Compared as bytes: a float may be a NaN, which equals nothing.
        let second = Message::decode(kind, version, &again[FRAME_HEAD..]).expect("our own frame decodes");
        assert_eq!(second.encode(), again);
        if let Message::Desired(desired) = message {
            for alloc in desired.allocs {
                let _ = alloc.spec();
            }
        }
    }
}

/// MessagePack values inside frames.
pub fn blobs(bytes: &[u8]) {
    fn open<T: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
        if let Ok(value) = Blob(bytes.to_vec()).open::<T>() {
            let again = Blob::of(&value);
            let second = again.open::<T>().expect("what we encode decodes");
            assert_eq!(Blob::of(&second), again);
        }
    }
    open::<WorkloadSpec>(bytes);
    open::<NodeFacts>(bytes);
    if let Ok(status) = Blob(bytes.to_vec()).open::<AllocStatus>() {
        let _ = status.reason.as_ref().map(|r| (r.to_string(), r.root().to_string(), r.code()));
        open::<AllocStatus>(bytes);
    }
}

/// Records on disk: envelopes, snapshots, commands of the log.
pub fn stored(bytes: &[u8]) {
    if let Ok((kind, version, payload)) = codec::open_envelope(bytes) {
        assert_eq!(codec::envelope_bytes(kind, version, payload), bytes);
    }
    if let Ok(state) = State::from_bytes(bytes) {
        assert_eq!(State::from_bytes(&state.to_bytes()).expect("our own snapshot opens").digest(), state.digest());
    }
    // A committed command may be strange, but never stops `apply`.
    if let Ok(proposal) = codec::from_msgpack::<Proposal>(bytes) {
        let mut state = State::default();
        let _ = state.apply(1, proposal.clone());
        let _ = state.apply(1, proposal);
        let _ = state.digest();
    }
}

fn context() -> Context {
    Context { default_project: Name::new("shop").ok(), base_dir: PathBuf::from("/srv/shop"), environment: None }
}

/// Project files.
pub fn spec_toml(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match spec::parse_toml("optimus.toml", &text, &context()) {
        Ok(parsed) => accepted(&parsed.spec),
        Err(errors) => assert!(errors.to_string().contains("optimus.toml:"), "an error without a place: {errors}"),
    }
}

/// Project files as JSON, and specs as the API takes them.
pub fn spec_json(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
    match spec::parse_json(&value, &context()) {
        Ok(parsed) => accepted(&parsed.spec),
        Err(errors) => drop(errors.to_string()),
    }
    if let Ok(project) = serde_json::from_value::<ProjectSpec>(value) {
        let _ = (spec::check(&project), spec::not_available(&project));
    }
}

fn accepted(project: &ProjectSpec) {
    assert!(spec::check(project).is_empty(), "the reader let something through: {:?}", spec::check(project));
    let json = serde_json::to_string(project).expect("a spec serialises");
    assert_eq!(&serde_json::from_str::<ProjectSpec>(&json).expect("our own JSON"), project);
    let bytes = codec::to_msgpack(project);
    assert_eq!(&codec::from_msgpack::<ProjectSpec>(&bytes).expect("our own MessagePack"), project);
}

/// The copy-paste string.
pub fn join_token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(token) = JoinToken::decode(&text) {
        assert_eq!(JoinToken::decode(&token.encode()).map(|t| t.encode()).ok(), Some(token.encode()));
    }
}

/// Files and words between agent and runner.
pub fn runner_files(bytes: &[u8]) {
    if let Ok(start) = StartFile::decode(bytes) {
        assert_eq!(StartFile::decode(&start.encode()).ok(), Some(start));
    }
    if let Ok(run) = RunRecord::decode(bytes) {
        assert_eq!(RunRecord::decode(&run.encode()).ok(), Some(run));
    }
    if let Ok(exit) = ExitRecord::decode(bytes) {
        assert_eq!(ExitRecord::decode(&exit.encode()).ok(), Some(exit));
    }
    let text = String::from_utf8_lossy(bytes);
    if let Some(request) = Request::decode(&text) {
        assert_eq!(Request::decode(request.encode().trim_end()), Some(request));
    }
    if let Some(status) = Status::decode(&text) {
        assert_eq!(Status::decode(&status.encode()), Some(status));
    }
}

/// Sizes, cores, durations and names as people write them.
pub fn quantities(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(size) = text.parse::<Bytes>() {
        assert_eq!(size.to_string().parse(), Ok(size));
        let _ = size.human();
    }
    if let Ok(cores) = text.parse::<Millicores>() {
        assert_eq!(cores.to_string().parse(), Ok(cores));
    }
    if let Ok(span) = text.parse::<Span>() {
        assert_eq!(span.to_string().parse(), Ok(span));
    }
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.as_str(), text);
    }
}
