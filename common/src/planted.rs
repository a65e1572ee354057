//! Bugs planted on purpose, by which the simulator proves that it finds bugs.
//!
//! They exist only in a build with `--cfg optimus_planted` (which the environment variable `OPTIMUS_PLANTED` sets, see
//! `build.rs`), all of them in one build; one is chosen at run time by [`choose`]. In every other build [`planted`] is the
//! constant `false`, and what it guards is not compiled in.
//! `tests/simulation/planted.txt` lists them with the seed that finds each.

use std::sync::OnceLock;

static CHOSEN: OnceLock<String> = OnceLock::new();

/// Plants the bug of that name in this process. The first call counts.
///
/// Returns whether this build has planted bugs at all.
pub fn choose(name: &str) -> bool {
    let _ = CHOSEN.set(name.to_owned()); // a second choice would make the run irreproducible
    cfg!(optimus_planted)
}

/// Whether the bug of that name is planted in this process.
#[inline]
pub fn planted(name: &str) -> bool {
    cfg!(optimus_planted) && CHOSEN.get().is_some_and(|chosen| chosen == name)
}
