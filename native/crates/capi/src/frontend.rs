//! C ABI of the frontend domain.
