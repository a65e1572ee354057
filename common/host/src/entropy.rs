//! Randomness of the kernel.

use optimus_common::env::Entropy;

/// `getrandom(2)`.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    /// # Panics
    /// When the kernel gives no randomness. Going on would mean guessable secrets, so it is not an error to handle.
    fn fill(&self, bytes: &mut [u8]) {
        use rand::TryRngCore as _;
        rand::rngs::OsRng.try_fill_bytes(bytes).expect("getrandom(2) works on every kernel we run on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ() {
        let (mut a, mut b) = ([0u8; 32], [0u8; 32]);
        HostEntropy.fill(&mut a);
        HostEntropy.fill(&mut b);
        assert_ne!(a, b);
    }
}
