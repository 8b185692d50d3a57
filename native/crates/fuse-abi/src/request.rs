//! What arrives: the in header and the arguments, read from a byte slice with every access checked.

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER_LEN: usize = 40;

/// `struct fuse_in_header`, without padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the whole request in bytes, header included.
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
}

#[inline]
fn u32_at(buf: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(buf.get(at..at + 4)?.try_into().ok()?))
}

#[inline]
fn u64_at(buf: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(buf.get(at..at + 8)?.try_into().ok()?))
}

impl InHeader {
    /// The header at the start of `buf`; `None` when it is shorter than 40 bytes.
    #[inline]
    pub fn parse(buf: &[u8]) -> Option<InHeader> {
        if buf.len() < IN_HEADER_LEN {
            return None;
        }
        Some(InHeader {
            len: u32_at(buf, 0)?,
            opcode: u32_at(buf, 4)?,
            unique: u64_at(buf, 8)?,
            nodeid: u64_at(buf, 16)?,
        })
    }
}

/// `struct fuse_init_in`. Before 7.36 it has 16 bytes, then `flags2` follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    /// `flags` and, where INIT_EXT is set, `flags2` in the high half.
    pub flags: u64,
}

impl InitIn {
    /// The arguments of INIT; `None` when even major and minor are missing.
    #[inline]
    pub fn parse(args: &[u8]) -> Option<InitIn> {
        let low = u64::from(u32_at(args, 12).unwrap_or(0));
        let high = if low & crate::init_flags::INIT_EXT != 0 {
            u64::from(u32_at(args, 16).unwrap_or(0))
        } else {
            0
        };
        Some(InitIn {
            major: u32_at(args, 0)?,
            minor: u32_at(args, 4)?,
            max_readahead: u32_at(args, 8).unwrap_or(0),
            flags: low | high << 32,
        })
    }
}

/// Offset and size of READ, READDIR and READDIRPLUS (`struct fuse_read_in`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadIn {
    pub offset: u64,
    pub size: u32,
}

impl ReadIn {
    /// `None` when the arguments are too short.
    #[inline]
    pub fn parse(args: &[u8]) -> Option<ReadIn> {
        Some(ReadIn {
            offset: u64_at(args, 8)?,
            size: u32_at(args, 16)?,
        })
    }
}

/// `struct fuse_getxattr_in`, also used by LISTXATTR: the size of the caller's buffer, 0 asks for the length.
pub fn xattr_size(args: &[u8]) -> Option<u32> {
    u32_at(args, 0)
}

/// Bytes of `struct fuse_getxattr_in` before the name.
pub const GETXATTR_IN_LEN: usize = 8;

/// `struct fuse_lseek_in`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LseekIn {
    pub offset: u64,
    pub whence: u32,
}

impl LseekIn {
    /// `None` when the arguments are too short.
    #[inline]
    pub fn parse(args: &[u8]) -> Option<LseekIn> {
        Some(LseekIn {
            offset: u64_at(args, 8)?,
            whence: u32_at(args, 16)?,
        })
    }
}

/// The name at the start of `args`: the bytes before the first NUL. `None` when there is no NUL or no byte before it.
#[inline]
pub fn name(args: &[u8]) -> Option<&[u8]> {
    let end = args.iter().position(|&b| b == 0)?;
    if end == 0 { None } else { args.get(..end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_input_is_refused() {
        assert_eq!(InHeader::parse(&[0; 39]), None);
        assert_eq!(ReadIn::parse(&[0; 19]), None);
        assert_eq!(LseekIn::parse(&[0; 8]), None);
        assert_eq!(InitIn::parse(&[7, 0, 0, 0]), None);
        assert_eq!(name(b"abc"), None);
        assert_eq!(name(b"\0"), None);
        assert_eq!(name(b"abc\0d"), Some(&b"abc"[..]));
    }

    /// Every parser takes every length, and looks at no byte beyond what it needs.
    #[test]
    fn any_bytes_of_any_length_are_parsed_or_refused() {
        let mut state = 9u64;
        for len in 0..200 {
            for _ in 0..20 {
                let args: Vec<u8> = (0..len)
                    .map(|_| {
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        (state >> 60) as u8 * 17
                    })
                    .collect();
                assert_eq!(InHeader::parse(&args).is_some(), len >= IN_HEADER_LEN);
                assert_eq!(InitIn::parse(&args).is_some(), len >= 8);
                assert_eq!(ReadIn::parse(&args).is_some(), len >= 20);
                assert_eq!(LseekIn::parse(&args).is_some(), len >= 20);
                assert_eq!(xattr_size(&args).is_some(), len >= 4);
                if let Some(name) = name(&args) {
                    assert!(!name.is_empty() && !name.contains(&0) && name.len() < len);
                }
            }
        }
    }

    #[test]
    fn flags2_counts_only_with_init_ext() {
        let mut args = [0u8; 64];
        args[0] = 7;
        args[4] = 41;
        args[16] = 0x41;
        assert_eq!(InitIn::parse(&args).map(|i| i.flags), Some(0));
        args[15] = 0x40;
        assert_eq!(InitIn::parse(&args).map(|i| i.flags), Some(0x41_4000_0000));
    }
}
