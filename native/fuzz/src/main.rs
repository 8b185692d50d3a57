//! The driver of libFuzzer. `FUZZ_TARGET` names the target; with `FUZZ_SEEDS` the seeds of that target are written to
//! this folder, and nothing is run. Built and started by scripts/fuzz.
#![no_main]

use std::sync::OnceLock;

use fuzz::Target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fn init() {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = fuzz::TARGETS.iter().find(|t| t.name == name) else {
        let names: Vec<&str> = fuzz::TARGETS.iter().map(|t| t.name).collect();
        eprintln!("FUZZ_TARGET is one of: {}", names.join(" "));
        std::process::exit(2);
    };
    if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
        let folder = std::path::PathBuf::from(folder);
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{i:03}")), seed).expect("a folder for seeds");
        }
        std::process::exit(0);
    }
    let _ = TARGET.set(target);
}

libfuzzer_sys::fuzz_target!(init: init(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(data);
    }
});
