//! Extended attributes behind an inode: a 12-byte header, then entries padded to 4 bytes.

use crate::error::{FormatError, Result};
use crate::format::*;
use crate::inode::Inode;

const HEADER_SIZE: u64 = 12;
const ENTRY_SIZE: u64 = 4;
/// Longest name with its prefix.
const NAME_MAX_WITH_PREFIX: usize = 255;

/// An attribute: prefix and suffix of its name, and its value.
pub type Xattr<'a> = (&'static [u8], &'a [u8], &'a [u8]);

/// Prefix that an index stands for, and whether a suffix follows it.
fn prefix(index: u8) -> Option<(&'static [u8], bool)> {
    match index {
        1 => Some((b"user.", true)),
        2 => Some((b"system.posix_acl_access", false)),
        3 => Some((b"system.posix_acl_default", false)),
        4 => Some((b"trusted.", true)),
        6 => Some((b"security.", true)),
        _ => None,
    }
}

/// The attributes of an inode in their stored order. Ends after the first error.
pub struct Xattrs<'a> {
    image: &'a [u8],
    /// Next header or entry, and the end of the area, as offsets in the image.
    at: u64,
    end: u64,
    /// Whether the header is still to come.
    header: bool,
}

impl<'a> Xattrs<'a> {
    pub(crate) fn new(image: &'a [u8], inode: &Inode) -> Xattrs<'a> {
        let end = inode.body();
        Xattrs {
            image,
            at: end - u64::from(inode.xattr_size),
            end,
            header: inode.has_xattr(),
        }
    }

    fn advance(&mut self) -> Result<Option<Xattr<'a>>> {
        if self.header {
            let header: &[u8; HEADER_SIZE as usize] = need(self.image, self.at, "xattr_header")?;
            if header[4] != 0 {
                return Err(FormatError::malformed(
                    "xattr_header.shared_count",
                    self.at,
                    "shared extended attributes are not part of RAFS",
                ));
            }
            self.header = false;
            self.at += HEADER_SIZE;
        }
        if self.at >= self.end {
            return Ok(None);
        }
        let at = self.at;
        let bad = |what, message| Err(FormatError::malformed(what, at, message));
        let entry: &[u8; ENTRY_SIZE as usize] = need(self.image, at, "xattr")?;
        let (name_len, value_len) = (u64::from(entry[0]), u64::from(le16(entry, 2)));
        let size = ENTRY_SIZE + name_len + value_len;
        if size > self.end - at {
            return bad("xattr.e_value_size", "reaches beyond the attributes");
        }
        let Some((prefix, wants_suffix)) = prefix(entry[1]) else {
            return bad("xattr.e_name_index", "unknown");
        };
        let suffix = need_slice(self.image, at + ENTRY_SIZE, name_len, "xattr")?;
        let value = need_slice(self.image, at + ENTRY_SIZE + name_len, value_len, "xattr")?;
        if suffix.is_empty() == wants_suffix
            || prefix.len() + suffix.len() > NAME_MAX_WITH_PREFIX
            || suffix.contains(&0)
        {
            return bad("xattr.e_name", "not a name for this prefix");
        }
        // Entries, header and area are all multiples of 4 bytes, so that this does not pass the end.
        self.at = (at + size).next_multiple_of(ENTRY_SIZE);
        Ok(Some((prefix, suffix, value)))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.advance().transpose();
        if matches!(item, Some(Err(_))) {
            (self.at, self.header) = (self.end, false);
        }
        item
    }
}

impl std::iter::FusedIterator for Xattrs<'_> {}

/// Value of the attribute with this full name.
pub(crate) fn get<'a>(image: &'a [u8], inode: &Inode, name: &[u8]) -> Result<Option<&'a [u8]>> {
    for item in Xattrs::new(image, inode) {
        let (prefix, suffix, value) = item?;
        if name.strip_prefix(prefix) == Some(suffix) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}
