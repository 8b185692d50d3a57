//! Extended attributes as they stand in an inode (docs/formats/rafs-v6.md).

use crate::error::BuildError;

const HEADER: usize = 12;
const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 65_535;
/// `i_xattr_icount` has 16 bits and counts in units of 4 bytes from the header on.
const BODY_MAX: usize = HEADER + (0xffff - 1) * 4;

/// EROFS's numbers of name prefixes; those without a dot at the end are whole names.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];
const REMEDY: &str = "remove the attribute with setfattr -x";

/// Collects the attributes of one file.
#[derive(Default)]
pub struct Xattrs {
    entries: Vec<(u8, Vec<u8>, Vec<u8>)>,
    refused: Option<String>,
}

impl Xattrs {
    /// Adds an attribute by its full name; what the format cannot hold is reported by [`Xattrs::body`].
    pub fn add(&mut self, name: &[u8], value: &[u8]) {
        let known = PREFIXES.iter().find_map(|(index, prefix)| {
            let suffix = name.strip_prefix(*prefix)?;
            (suffix.is_empty() != prefix.ends_with(b".")).then_some((*index, suffix))
        });
        let shown = String::from_utf8_lossy(name);
        match known {
            None => {
                self.refused = Some(format!(
                    "RAFS has no room for extended attributes named {shown}"
                ))
            }
            Some(_) if name.len() > NAME_MAX || value.len() > VALUE_MAX => {
                self.refused = Some(format!("the extended attribute {shown} is too long"));
            }
            Some((index, suffix)) => self.entries.push((index, suffix.into(), value.into())),
        }
    }

    /// The bytes behind the inode: none, or header and entries, sorted.
    pub fn body(mut self, path: &[u8]) -> Result<Vec<u8>, BuildError> {
        let refuse = |reason| BuildError::Source {
            path: path.into(),
            reason,
            remedy: REMEDY,
        };
        if let Some(reason) = self.refused {
            return Err(refuse(reason));
        }
        if self.entries.is_empty() {
            return Ok(Vec::new());
        }
        self.entries.sort_unstable();
        let mut body = vec![0; HEADER];
        for (index, suffix, value) in &self.entries {
            body.extend([suffix.len() as u8, *index]);
            body.extend((value.len() as u16).to_le_bytes());
            body.extend(suffix);
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        if body.len() > BODY_MAX {
            return Err(refuse(
                "its extended attributes are larger than 256 KiB".into(),
            ));
        }
        Ok(body)
    }
}

/// `i_xattr_icount` of a body with `len` bytes.
pub fn icount(len: usize) -> u16 {
    if len == 0 {
        0
    } else {
        ((len - HEADER) / 4 + 1) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(entries: &[(&[u8], &[u8])]) -> Result<Vec<u8>, String> {
        let mut xattrs = Xattrs::default();
        for (name, value) in entries {
            xattrs.add(name, value);
        }
        xattrs.body(b"f").map_err(|e| match e {
            BuildError::Source { reason, .. } => reason,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let long = vec![0; 65_536];
        for (entry, reason) in [
            ((&b"system.nfs4_acl"[..], &b"x"[..]), "system.nfs4_acl"),
            ((b"btrfs.compression", b"x"), "btrfs.compression"),
            ((b"user.", b"x"), "user."),
            ((b"user.x", &long), "too long"),
        ] {
            assert!(body(&[entry]).unwrap_err().contains(reason));
        }
        let many: Vec<Vec<u8>> = (0..5).map(|i| format!("user.{i}").into_bytes()).collect();
        let many: Vec<(&[u8], &[u8])> = many
            .iter()
            .map(|n| (n.as_slice(), &long[..65_000]))
            .collect();
        assert!(body(&many).unwrap_err().contains("256 KiB"));
        assert!(body(&many[..4]).is_ok());
    }

    #[test]
    fn entries_are_sorted_by_prefix_and_name() {
        let found = body(&[
            (b"user.b", b"12345"),
            (b"security.c", b""),
            (b"user.a", b""),
        ])
        .unwrap();
        assert_eq!(icount(found.len()) as usize, (found.len() - 12) / 4 + 1);
        assert_eq!(
            &found[12..],
            b"\x01\x01\0\0a\0\0\0\x01\x01\x05\0b12345\0\0\x01\x06\0\0c\0\0\0"
        );
        assert_eq!(body(&[]).unwrap(), b"");
        assert_eq!(icount(0), 0);
    }
}
