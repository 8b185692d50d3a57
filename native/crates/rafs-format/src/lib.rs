//! RAFS bootstrap and blob metadata: parsers that do no I/O.
