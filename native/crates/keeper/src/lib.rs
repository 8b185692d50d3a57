//! The process that owns what must survive a worker.
