//! The shared layouts, byte for byte. All integers are little endian (the only byte order this project runs on).
//!
//! State file: a 4096-byte header, then `chunk_count` words of 32 bits.
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | u64 | magic [`STATE_MAGIC`], written last when a file is made |
//! | 8 | u32 | version |
//! | 12 | u32 | chunk_count |
//! | 16 | 16 B | boot id of the kernel under which `verified` was last true |
//! | 32 | 32 B | map digest: sha256 over the blob's chunk map as the bootstrap promises it |
//! | 64 | 64 B | blob id, NUL padded |
//! | 128 | u64 | data_size: length of the data file |
//! | 136 | u64 | inode number of the data file that the states speak of (0: none) |
//! | 144 | u32 | [`SECTIONS`] when the two tables behind the words are complete |
//!
//! Behind the words, from the next multiple of 8 on: u32 per chunk, when it was last used, in seconds since the epoch
//! (a time to come: a request waits for it); from the next multiple of 8 on: 16 bytes per chunk
//! {data_offset u64, size u32, flags u32}, by which eviction knows the places of chunks of any image. Workers map
//! neither.
//!
//! Extent table: a 64-byte header {magic u64, version u32, chunk_count u32}, then 32 bytes per chunk
//! {data_offset u64, size u32, flags u32, spill u64, reserved u64}.
//!
//! Touched table: one byte per chunk, without a header (see [`TOUCHED_NOW`]).

/// First word of a state file ("VRCHSTAT").
pub const STATE_MAGIC: u64 = u64::from_le_bytes(*b"VRCHSTAT");
/// First word of an extent table ("VREXTENT").
pub const EXTENT_MAGIC: u64 = u64::from_le_bytes(*b"VREXTENT");
/// Version of both layouts.
pub const VERSION: u32 = 1;

/// Bytes before the first state word.
pub const STATE_HEADER: usize = 4096;
/// Bytes before the first extent.
pub const EXTENT_HEADER: usize = 64;
/// Bytes of one extent.
pub const EXTENT_SIZE: usize = 32;

/// Byte offsets in the state header.
pub mod state_header {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const CHUNK_COUNT: usize = 12;
    pub const BOOT_ID: usize = 16;
    pub const MAP_DIGEST: usize = 32;
    pub const BLOB_ID: usize = 64;
    pub const DATA_SIZE: usize = 128;
    pub const DATA_INO: usize = 136;
    pub const SECTIONS: usize = 144;
}

/// Nothing usable is stored.
pub const ABSENT: u32 = 0;
/// Somebody fetches it: a hint for people and other daemons, nobody waits for it.
pub const FETCHING: u32 = 1;
/// Bytes are stored but were not verified under this boot.
pub const PRESENT: u32 = 2;
/// Bytes are stored and verified: the only state that is served.
pub const VERIFIED: u32 = 3;

/// The bytes are being given back to the file system. Whoever holds the directory's eviction lock owns the chunk: until
/// it is absent, nobody else may write its bytes or its word.
pub const EVICTING: u32 = 4;

/// Value of the header's field of that name.
pub const SECTIONS: u32 = 1;
/// Times of last use are at most so far ahead of now: as long as a request may wait. What is farther ahead was written
/// under another clock.
pub const MAX_HOLD_S: u32 = 3600;
/// Place flag: no other chunk shares bytes with this one, so it can be evicted.
pub const PLACE_ALONE: u32 = 1;
/// Bytes of one entry of the place table.
pub const PLACE_SIZE: usize = 16;

/// The state in a state word; the bits above are a generation that grows with every change.
pub const fn state_of(word: u32) -> u32 {
    word & 7
}

/// The word that follows `word` when the chunk enters `state`.
pub const fn next_word(word: u32, state: u32) -> u32 {
    (word >> 3).wrapping_add(1) << 3 | state
}

/// Extent flag: the image refers to this chunk and promises its size.
pub const EXTENT_VALID: u32 = 1;

/// Touched bit that workers set when they have answered a read from the chunk, and the agent takes away when it looks
/// which chunks are in use.
pub const TOUCHED_NOW: u8 = 1;
/// Touched bit that the agent leaves where it took [`TOUCHED_NOW`] away: a byte that is not 0 was touched at some time.
pub const TOUCHED_BEFORE: u8 = 2;

/// Spill offsets are counted in units of this many bytes.
pub const SPILL_UNIT: u64 = 4096;
/// Number of low bits of a spill word that hold the offset; the generation stands above and is never 0.
pub const SPILL_GENERATION_SHIFT: u32 = 40;

/// The spill word for byte `offset` (a multiple of [`SPILL_UNIT`]) of the spill memfd.
pub const fn spill_word(generation: u32, offset: u64) -> u64 {
    (generation as u64) << SPILL_GENERATION_SHIFT | (offset / SPILL_UNIT + 1)
}

/// Generation and byte offset of a spill word; `None` when it says "not in the spill" or is malformed.
pub const fn split_spill(word: u64) -> Option<(u32, u64)> {
    let generation = (word >> SPILL_GENERATION_SHIFT) as u32;
    let unit = word & ((1 << SPILL_GENERATION_SHIFT) - 1);
    if generation == 0 || unit == 0 {
        None
    } else {
        Some((generation, (unit - 1) * SPILL_UNIT))
    }
}

/// Bytes of a state file for `count` chunks.
pub const fn state_len(count: u32) -> usize {
    STATE_HEADER + count as usize * 4
}

/// Byte offset of the time of last use of `chunk`.
pub const fn used_at(count: u32, chunk: u32) -> usize {
    state_len(count).next_multiple_of(8) + chunk as usize * 4
}

/// Byte offset of the place of `chunk`.
pub const fn place_at(count: u32, chunk: u32) -> usize {
    used_at(count, count).next_multiple_of(8) + chunk as usize * PLACE_SIZE
}

/// Bytes of a state file with all sections.
pub const fn full_len(count: u32) -> usize {
    place_at(count, count)
}

/// Bytes of a touched table for `count` chunks. A mapping has at least one byte.
pub const fn touched_len(count: u32) -> usize {
    if count == 0 { 1 } else { count as usize }
}

/// Bytes of an extent table for `count` chunks.
pub const fn extent_len(count: u32) -> usize {
    EXTENT_HEADER + count as usize * EXTENT_SIZE
}
