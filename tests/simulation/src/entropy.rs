//! All randomness of a run comes from its seed.
//!
//! What the code under test asks of its seams is easy. But tokio's `select!` and the standard library's hash maps ask the
//! operating system, so this binary has its own `getrandom`: it answers from the seed once [`seed_process`] was called,
//! and passes on to the kernel before that. One process runs one seed, because tokio counts runtimes in a process-wide
//! counter that it mixes into its own seed.

use std::sync::atomic::{AtomicU64, Ordering};

/// State of the process-wide generator; 0: ask the kernel.
static PROCESS: AtomicU64 = AtomicU64::new(0);

/// From now on the operating system's randomness of this process is that of `seed`.
pub fn seed_process(seed: u64) {
    PROCESS.store(mix(seed) | 1, Ordering::SeqCst);
}

/// The C library's `getrandom`, for everything linked into this binary.
///
/// # Safety
/// As the original: `buf` must be valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buf: *mut libc::c_void, len: libc::size_t, flags: libc::c_uint) -> libc::ssize_t {
    let mut state = PROCESS.load(Ordering::SeqCst);
    if state == 0 {
        // SAFETY: the caller's promise about `buf` is passed on.
        return unsafe { libc::syscall(libc::SYS_getrandom, buf, len, flags) as libc::ssize_t };
    }
    for at in 0..len {
        state = state.wrapping_add(GOLDEN);
        // SAFETY: `at` is below `len`, for which the caller says `buf` is valid.
        unsafe { buf.cast::<u8>().add(at).write(mix(state) as u8) };
    }
    PROCESS.store(state | 1, Ordering::SeqCst);
    len as libc::ssize_t
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A small seeded generator (SplitMix64). Each part of the world has its own, so that one part drawing more often
/// changes nothing for the others.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of one part of the run of `seed`.
    pub fn new(seed: u64, part: u64) -> Self {
        Self(mix(mix(seed.wrapping_add(GOLDEN)) ^ part.wrapping_mul(GOLDEN)))
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number of `range`, which must not be empty.
    pub fn range(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.u64() % (range.end - range.start)
    }

    /// True in `percent` of 100 cases; fractions count.
    pub fn chance(&mut self, percent: f64) -> bool {
        ((self.u64() >> 11) as f64 / (1u64 << 53) as f64) * 100.0 < percent
    }

    /// One of `items`.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        if items.is_empty() { None } else { items.get(self.range(0..items.len() as u64) as usize) }
    }
}
