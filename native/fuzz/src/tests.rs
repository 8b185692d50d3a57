//! Every target over its seeds, over what was found earlier, and over seeds with damage: the quick look at each change.
//! scripts/fuzz is the long one.

use super::*;

fn regressions(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let Ok(entries) = std::fs::read_dir(folder.join(target.name)) else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.display().to_string(), std::fs::read(&path).unwrap())
        })
        .collect();
    found.sort();
    found
}

fn smoke(name: &str) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target");
    for (path, data) in regressions(target) {
        println!("{path}");
        (target.run)(&data);
    }
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty());
    let mut random = virtq::testing::Random::new(1);
    for (i, seed) in seeds.iter().enumerate() {
        println!("{name}: seed {i}");
        (target.run)(seed);
        for step in 0..8 {
            println!("{name}: seed {i}, damage {step}");
            let mut other = seed.clone();
            if step % 4 == 3 {
                other.truncate(random.below(seed.len() as u64 + 1) as usize);
            }
            for _ in 0..=step {
                let at = random.below(other.len().max(1) as u64) as usize;
                if let Some(byte) = other.get_mut(at) {
                    *byte = random.draw() as u8;
                }
            }
            (target.run)(&other);
        }
    }
    (target.run)(&[]);
}

macro_rules! smoke_tests {
    ($($name:ident),* $(,)?) => {
        const SMOKED: &[&str] = &[$(stringify!($name)),*];
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*
    };
}

smoke_tests![
    blob_meta, bootstrap, chain, channel, decode, device, fuse, hostile, ring, shared, tables, toc,
];

#[test]
fn every_target_is_smoked_and_every_regression_has_a_target() {
    let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    assert_eq!(names, SMOKED);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name();
        let name = name.to_str().unwrap();
        assert!(name == "README.md" || names.contains(&name), "{name}");
    }
}
