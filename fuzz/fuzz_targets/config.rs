#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ackonce_fuzz::config(data));
