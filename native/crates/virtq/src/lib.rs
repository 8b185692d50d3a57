//! Guest memory and split virtqueues, device side.
