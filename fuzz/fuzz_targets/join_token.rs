#![no_main]

#[path = "../../tests/src/fuzz_targets.rs"]
#[allow(dead_code)] // each binary uses one of them
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::join_token(data));
