//! C ABI of the rafs domain.
