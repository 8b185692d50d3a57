//! From a bootstrap to the promise about each of its blobs.

use rafs_format::{
    BlobEntry, ChunkMap, ChunkTable, FormatError, Tree, check_references, chunk_info,
};

use crate::spec::{BlobSpec, MAX_CHUNKS, SpecError};

/// What a bootstrap says about its blobs, and what is still missing.
#[derive(Debug)]
pub struct Promise {
    entries: Vec<BlobEntry>,
    maps: Vec<ChunkMap>,
    missing: Vec<bool>,
}

impl Promise {
    /// Reads blob table and chunk table of the bootstrap `image`.
    pub fn parse(image: &[u8]) -> Result<Promise, FormatError> {
        let tree = Tree::parse(image)?;
        let entries = tree.blobs()?;
        let maps = ChunkTable::parse(&tree)?.into_maps();
        let short: Vec<bool> = entries
            .iter()
            .zip(&maps)
            .map(|(e, m)| m.len() < e.chunk_count as usize)
            .collect();
        // A table that leaves chunks out is complete all the same when no file needs them; builders do that when a
        // layer hides files of another one.
        let complete = short.iter().all(|s| !s)
            || (maps.iter().any(|m| !m.is_empty()) && check_references(&tree, &maps).is_ok());
        let missing = short.iter().map(|s| *s && !complete).collect();
        Ok(Promise {
            entries,
            maps,
            missing,
        })
    }

    /// The blob table.
    pub fn entries(&self) -> &[BlobEntry] {
        &self.entries
    }

    /// Whether blob `index` needs [`Promise::set_chunk_info`] before it can be opened.
    pub fn needs_chunk_info(&self, index: usize) -> bool {
        self.missing.get(index).copied().unwrap_or(false)
    }

    /// Known chunks of blob `index`, and how many of them have no digest.
    pub fn known(&self, index: usize) -> (usize, usize) {
        self.maps.get(index).map_or((0, 0), |m| {
            (m.len(), m.iter().filter(|c| c.digest.is_none()).count())
        })
    }

    /// Fills in what the chunk table does not say, from the uncompressed chunk-info array, or (`meta_file`) from a
    /// `blob.meta` file. Pass digests only when their source was authenticated.
    pub fn set_chunk_info(
        &mut self,
        index: usize,
        bytes: &[u8],
        meta_file: bool,
        digests: Option<&[u8]>,
    ) -> Result<(), FormatError> {
        let (Some(entry), Some(map), Some(missing)) = (
            self.entries.get(index),
            self.maps.get_mut(index),
            self.missing.get_mut(index),
        ) else {
            return Err(FormatError::malformed(
                "blob",
                0,
                format!("there is no blob {index}"),
            ));
        };
        let array = if meta_file {
            chunk_info::from_meta_file(entry, bytes)?
        } else {
            bytes
        };
        *map = ChunkMap::from_chunk_info(entry, array, digests)?;
        *missing = false;
        Ok(())
    }

    /// The promise for blob `index`. Errors when all blobs together exceed what one daemon takes on.
    pub fn spec(&self, index: usize) -> Result<BlobSpec, SpecError> {
        let total: usize = self
            .maps
            .iter()
            .map(|m| m.iter().next_back().map_or(0, |c| c.index as usize + 1))
            .sum();
        if total > MAX_CHUNKS {
            return Err(SpecError(format!(
                "chunk_count: {total} in all blobs exceeds {MAX_CHUNKS}"
            )));
        }
        match (self.entries.get(index), self.maps.get(index)) {
            (Some(entry), Some(map)) => BlobSpec::from_map(entry, map),
            _ => Err(SpecError(format!("there is no blob {index}"))),
        }
    }
}
