"""The loaded library, the check that it fits, and the one table from native codes to exceptions."""

from __future__ import annotations

from typing import Any, NoReturn

from virtiofsd_rafs.errors import (
    BadImage,
    CacheError,
    ConfigError,
    DigestMismatch,
    LocalError,
    PeerError,
    UnsupportedFeature,
    VirtiofsdRafsError,
)

try:
    from virtiofsd_rafs._native import ffi as _ffi
    from virtiofsd_rafs._native import lib as _lib
except ImportError as e:
    raise ImportError(
        "virtiofsd_rafs._native is not built: run scripts/dev (or pip install -e .) in the project's folder"
    ) from e

ffi: Any = _ffi
lib: Any = _lib

ABI_VERSION = 4
if lib.vr_abi_version() != ABI_VERSION:
    raise ImportError(
        f"virtiofsd_rafs._native speaks ABI {lib.vr_abi_version()}, the package {ABI_VERSION}: "
        "run scripts/dev again"
    )


class NoSpace(CacheError):
    """The cache disk or the memory that stands in for it is full."""

    msgid = "cache.full"


def last_error() -> str:
    """The text of the calling thread's last native failure."""
    buf = ffi.new("uint8_t[]", 2048)
    n = min(lib.vr_last_error(buf, 2048), 2048)
    return bytes(ffi.buffer(buf, n)).decode("utf-8", "replace")


_CODES: dict[int, type[VirtiofsdRafsError]] = {
    -1: ConfigError,
    -2: CacheError,
    -4: DigestMismatch,
    -5: UnsupportedFeature,
    -6: NoSpace,
    -7: PeerError,
    -70: LocalError,
}


def _fail(code: int) -> NoReturn:
    text = last_error()
    if code == -3:
        where, _, message = text.partition(": ")
        raise BadImage(where, message or where)
    raise _CODES.get(code, LocalError)(text or f"native code {code}")


def raise_for(code: int) -> int:
    """*code* itself when it is not negative; otherwise the exception that it stands for is raised."""
    if code < 0:
        _fail(code)
    return code
