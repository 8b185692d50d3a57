"""RAFS v6 bootstraps: layout, reader, walk, dump. Takes buffers, does no I/O."""
