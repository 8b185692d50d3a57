//! Table of contents at the end of a blob: entries of 128 bytes, then a tar header.
//!
//! What is parsed here must have been authenticated first, by the digest in the blob table
//! ([`crate::BlobEntry::trusted_toc`]).

use std::ops::Range;

use crate::algorithm::Compressor;
use crate::error::{FormatError, Result};
use crate::format::*;

const ENTRY_SIZE: usize = 128;
const NAME_SIZE: usize = 16;
const TAR_NAME: &[u8; 14] = b"rafs.blob.toc\0";
const TAR_SIZE: Range<usize> = 124..136;
const TAR_CHECKSUM: Range<usize> = 148..156;
/// Readers look for the table in so many bytes at the end of a blob.
const TOC_MAX: u64 = 4096;

/// Section with the chunk-info array.
pub const BLOB_META: &str = "blob.meta";
/// Section with the header of the chunk-info array.
pub const BLOB_META_HEADER: &str = "blob.meta.header";
/// Section with the digests of the chunks, 32 bytes each.
pub const BLOB_DIGEST: &str = "blob.digest";
/// Section with the chunks. Its offset and sizes are not reliable.
pub const IMAGE_BLOB: &str = "image.blob";
/// Section with an embedded bootstrap.
pub const IMAGE_BOOT: &str = "image.boot";

/// A section of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    name: [u8; NAME_SIZE],
    pub compressor: Compressor,
    /// SHA-256 of the uncompressed section (of `image.blob`: of the stored bytes and their tar header).
    pub digest: [u8; 32],
    pub compressed_offset: u64,
    pub compressed_size: u64,
    pub uncompressed_size: u64,
}

impl Section {
    /// Name without padding; empty when it is no UTF-8.
    pub fn name(&self) -> &str {
        let end = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_SIZE);
        std::str::from_utf8(self.name.get(..end).unwrap_or_default()).unwrap_or_default()
    }
}

/// The sections of a blob.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toc {
    sections: Vec<Section>,
}

impl Toc {
    /// Parses the last `toc_size` bytes of a blob of `blob_size` bytes.
    pub fn parse(tail: &[u8], blob_size: u64) -> Result<Toc> {
        let Some(size) = (tail.len() as u64)
            .checked_sub(TAR_HEADER_SIZE)
            .filter(|s| s % ENTRY_SIZE as u64 == 0 && s + TAR_HEADER_SIZE <= TOC_MAX)
        else {
            return Err(FormatError::malformed(
                "toc",
                0,
                format!(
                    "{} bytes are no entries of {ENTRY_SIZE} and a tar header",
                    tail.len()
                ),
            ));
        };
        let header: &[u8; TAR_HEADER_SIZE as usize] = need(tail, size, "toc.tar_header")?;
        if !header.starts_with(TAR_NAME) {
            return Err(FormatError::malformed(
                "toc.tar_header",
                size,
                "not that of a table of contents",
            ));
        }
        let blank = header
            .iter()
            .enumerate()
            .map(|(at, byte)| match TAR_CHECKSUM.contains(&at) {
                true => u64::from(b' '),
                false => u64::from(*byte),
            });
        if octal(header.get(TAR_CHECKSUM)) != Some(blank.sum()) {
            return Err(FormatError::malformed(
                "toc.tar_header",
                size,
                "the checksum is wrong",
            ));
        }
        if octal(header.get(TAR_SIZE)) != Some(size) {
            return Err(FormatError::malformed(
                "toc.tar_header",
                size,
                "another size than that of the entries",
            ));
        }
        let entries = need_slice(tail, 0, size, "toc")?;
        let sections = records_of::<ENTRY_SIZE>(entries)
            .enumerate()
            .map(|(i, raw)| section(raw, i * ENTRY_SIZE, blob_size));
        let toc = Toc {
            sections: sections.collect::<Result<_>>()?,
        };
        for (i, section) in toc.sections.iter().enumerate() {
            if toc
                .sections
                .iter()
                .skip(i + 1)
                .any(|other| other.name == section.name)
            {
                let at = (i * ENTRY_SIZE) as u64;
                return Err(FormatError::malformed(
                    "toc.name",
                    at,
                    "there are two sections of this name",
                ));
            }
        }
        Ok(toc)
    }

    /// The section with this name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name() == name)
    }

    /// All sections, in their stored order.
    pub fn iter(&self) -> std::slice::Iter<'_, Section> {
        self.sections.iter()
    }
}

fn section(raw: &[u8; ENTRY_SIZE], at: usize, blob_size: u64) -> Result<Section> {
    let at = at as u64;
    let compressor = match le32(raw, 0) {
        1 => Compressor::None,
        2 => Compressor::Zstd,
        4 => Compressor::Lz4Block,
        other => {
            return Err(FormatError::malformed(
                "toc.flags",
                at,
                format!("{other:#x} is no known compressor"),
            ));
        }
    };
    let section = Section {
        name: bytes_at(raw, 8),
        compressor,
        digest: bytes_at(raw, 24),
        compressed_offset: le64(raw, 56),
        compressed_size: le64(raw, 64),
        uncompressed_size: le64(raw, 72),
    };
    if section.name().is_empty() {
        return Err(FormatError::malformed("toc.name", at, "not a name"));
    }
    // Builders say of the data section that it starts at its own end, and that it is uncompressed whatever its
    // chunks are: nothing but its name and digest means anything.
    if section.name() == IMAGE_BLOB {
        return Ok(section);
    }
    let end = section
        .compressed_offset
        .checked_add(section.compressed_size);
    if end.is_none_or(|end| end > blob_size) {
        return Err(FormatError::malformed(
            "toc.compressed_offset",
            at,
            "a section beyond the blob's end",
        ));
    }
    if compressor == Compressor::None && section.compressed_size != section.uncompressed_size {
        return Err(FormatError::malformed(
            "toc.compressed_size",
            at,
            "two sizes of an uncompressed section",
        ));
    }
    Ok(section)
}

/// Value of an octal tar field, which spaces and NUL may surround.
fn octal(field: Option<&[u8]>) -> Option<u64> {
    let text = std::str::from_utf8(field?).ok()?;
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
}
