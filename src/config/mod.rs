//! Configuration: what was typed, turned once into what is safe to run.

pub mod checked;

pub use checked::Config;
