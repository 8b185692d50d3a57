//! Damaged images: every reader method ends, with a result or an error, and without a panic.

mod support;

use std::path::PathBuf;

use support::{read_everything, sample};

/// The sample, and the fixture where it is present.
fn images() -> Vec<Vec<u8>> {
    let fixture = "../../../../shared/fixtures/nydus/bootstrap/rafs-v6-2.2.boot";
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(fixture);
    std::iter::once(sample())
        .chain(std::fs::read(fixture).ok())
        .collect()
}

#[test]
fn undamaged_images_are_read() {
    for image in images() {
        assert!(read_everything(&image).unwrap() > 10);
    }
}

#[test]
fn each_byte_flipped() {
    for mut image in images() {
        let mut refused = 0;
        for at in 0..image.len() {
            let byte = image[at];
            // Bytes that are 0 are mostly padding: two values are enough there.
            let masks: &[u8] = if byte == 0 {
                &[1, 0xff]
            } else {
                &[1, 2, 4, 8, 16, 32, 64, 128, 0xff]
            };
            for mask in masks {
                image[at] = byte ^ mask;
                refused += u32::from(read_everything(&image).is_err());
            }
            image[at] = byte;
        }
        assert!(refused > 500, "only {refused} damaged images were refused");
    }
}

#[test]
fn each_length() {
    for image in images() {
        for len in 0..image.len() {
            assert!(
                read_everything(&image[..len]).is_err(),
                "{len} of {} bytes",
                image.len()
            );
            if len % 64 == 0 {
                // The same with zeros instead of the end, which passes the check of the length.
                let mut cut = image[..len].to_vec();
                cut.resize(image.len(), 0);
                let _ = read_everything(&cut);
            }
        }
    }
}

#[test]
fn many_bytes_at_once() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for image in images() {
        let interesting: Vec<usize> = (0..image.len()).filter(|&i| image[i] != 0).collect();
        for _ in 0..4000 {
            let mut damaged = image.clone();
            for _ in 0..1 + random() % 6 {
                let near = interesting[random() as usize % interesting.len()];
                let at = (near + random() as usize % 9)
                    .saturating_sub(4)
                    .min(image.len() - 1);
                damaged[at] = random() as u8;
            }
            let _ = read_everything(&damaged);
        }
    }
}
