//! Chunk states, extents, decoding and verification: what the agent writes and the worker reads.
