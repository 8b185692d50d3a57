//! Fuzz targets: what a guest, a front-end, a registry, a cache directory or a worker that went wrong can send to us.
//!
//! Each module has a function `run` that takes any bytes and panics when the invariant in the module's first line does not
//! hold, and a function `seeds` with inputs that reach deep, made from an image of our own builder. libFuzzer calls
//! them (src/main.rs, scripts/fuzz), and so does `cargo test`, over the seeds and over `regressions/`: everything that was
//! ever found. docs/adr/0012-fuzzing.md says why it is built like this.

pub mod blob_meta;
pub mod bootstrap;
pub mod chain;
pub mod channel;
pub mod decode;
pub mod device;
pub mod fuse;
pub mod guest;
pub mod hostile;
pub mod image;
pub mod input;
pub mod ring;
pub mod shared;
pub mod tables;
pub mod toc;
pub mod world;

/// What can be fuzzed.
pub struct Target {
    pub name: &'static str,
    /// Panics when the invariant is broken.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($module:ident),* $(,)?) => {
        &[$(Target {
            name: stringify!($module),
            run: $module::run,
            seeds: $module::seeds,
        }),*]
    };
}

/// All targets.
pub const TARGETS: &[Target] = targets![
    blob_meta, bootstrap, chain, channel, decode, device, fuse, hostile, ring, shared, tables, toc,
];

#[cfg(test)]
mod tests;
