"""Typed facade over the Rust core: one module per domain, codes become exceptions.

The generated bindings live in ``virtiofsd_rafs._native`` (built by maturin, not in git).
"""

from virtiofsd_rafs.native._lib import ffi, last_error, lib, raise_for

__all__ = ["ffi", "last_error", "lib", "raise_for"]
