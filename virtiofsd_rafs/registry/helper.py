"""Credential helpers: how they are named, asked and understood. No I/O.

A helper is a program ``docker-credential-NAME``: ``get`` is its argument, the registry stands on its standard
input, the answer is JSON on its standard output. Its output is never shown: an error message of a helper may
hold what it was asked for.

Source: docker/docker-credential-helpers, README and client/.
"""

from __future__ import annotations

import json
import re

from virtiofsd_rafs.errors import AuthError
from virtiofsd_rafs.registry.auth import Credentials
from virtiofsd_rafs.registry.docker_config import config_host
from virtiofsd_rafs.registry.secret import Secret

# What a helper may send: an identity token of some clouds is 4 KiB.
MAX_REPLY = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HUB_SERVER = "https://index.docker.io/v1/"
# The name that stands for "the secret is an identity token".
_TOKEN_USER = "<token>"  # noqa: S105  (a user, and no secret)
# How helpers say that they have nothing, which is no failure.
_NOTHING = (b"credentials not found", b"no credentials server url", b"no credentials username")


def helper_program(name: str) -> str:
    """The program that the helper *name* is. Raises AuthError for a name that could be a path."""
    if not _NAME.fullmatch(name):
        raise AuthError(
            f"the credential helper {name[:80]!r} has an impossible name",
            remedy="mend credHelpers or credsStore: it is the part behind docker-credential-",
        )
    return f"docker-credential-{name}"


def helper_question(host: str) -> bytes:
    """What *host*'s helper is asked, as docker asks it."""
    return (_HUB_SERVER if config_host(host) == "docker.io" else host).encode() + b"\n"


def parse_helper_reply(name: str, status: int, output: bytes) -> Credentials | None:
    """What the helper *name* answered with exit code *status*; None when it has nothing for that registry.

    Raises AuthError, which names the helper and never shows its output.
    """
    if status != 0:
        if output.strip().lower().startswith(_NOTHING):
            return None
        raise helper_failed(name, f"ended with {f'signal {-status}' if status < 0 else f'code {status}'}")
    try:
        reply = json.loads(output)
    except (ValueError, RecursionError):
        raise helper_failed(name, "sent no JSON") from None
    user, secret = (reply.get("Username"), reply.get("Secret")) if isinstance(reply, dict) else (None, None)
    if not isinstance(user, str) or not isinstance(secret, str):
        raise helper_failed(name, "sent no Username and Secret")
    if not secret:
        return None
    if user == _TOKEN_USER:
        return Credentials("", Secret(""), Secret(secret))
    return Credentials(user, Secret(secret))


def helper_failed(name: str, why: str) -> AuthError:
    """The error of a helper that *why*."""
    return AuthError(
        f"the credential helper docker-credential-{name} {why}",
        remedy=f"run `docker-credential-{name} get` by hand with the registry's host on its input, "
        "or put the registry under `auths`",
    )
