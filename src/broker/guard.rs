//! The guard stream.
