//! The disposable process that serves FUSE from virtqueues.
