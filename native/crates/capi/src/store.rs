//! C ABI of the store domain.
