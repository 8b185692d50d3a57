"""Data blobs: chunk information, table of contents, codecs, digests. Takes buffers, does no I/O."""
