//! C ABI of the session domain.
