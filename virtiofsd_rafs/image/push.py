"""A built image into a registry: blobs, bootstrap layer, config, manifest, tag, in this order.

Source: OCI distribution-spec 1.1 (pushing blobs and manifests).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from virtiofsd_rafs.backends.config import RegistryAccess
from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.image.assemble import assemble
from virtiofsd_rafs.image.upload import Pusher
from virtiofsd_rafs.registry.reference import DEFAULT_TAG, parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = logging.getLogger(__name__)


async def push_image(
    out: Path,
    reference: str,
    *,
    plain_http: bool = False,
    access: RegistryAccess | None = None,
    deadline: float = 90.0,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Pushes the build in *out* as *reference* and returns the manifest's digest.

    Args:
        out: output directory of a build.
        reference: ``host/repository[:tag]``.
        plain_http: no TLS.
        access: how else to reach the registry; mirrors get nothing.
        deadline: seconds to try one blob again in while the registry is away.
        progress: told one line per step.

    Raises ConfigError for a directory that is no build, NotFound for a blob that is missing in it,
    DigestMismatch for one that is not what its name promises, BackendError when the registry does not take
    it.
    """
    target = parse_reference(reference)
    if target.digest is not None:
        raise ConfigError("a push cannot choose its digest", remedy="write host/repository:tag")
    parts = await asyncio.to_thread(assemble, out)
    say = progress or _log.info
    access = RegistryAccess.of(access, plain_http=plain_http)
    async with Pusher(target, access=access, deadline_s=deadline) as pusher:
        for upload in parts.uploads:
            known = await pusher.push_blob(upload)
            say(f"{upload.digest} {upload.size} bytes: {'already there' if known else 'pushed'}")
        await pusher.push_manifest(target.tag or DEFAULT_TAG, parts.manifest)
    return parts.digest
