#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| optimus_fuzz::blobs(bytes));
