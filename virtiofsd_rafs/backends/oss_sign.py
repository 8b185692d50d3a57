"""Signatures of Alibaba Cloud OSS for reading an object, without any I/O.

Version 4 (OSS4-HMAC-SHA256) binds a signature to day and region; version 1 (HMAC-SHA1) is for endpoints whose
region nobody knows. Neither covers the Range header, so that one plan serves any range. Headers are signed
rather than URLs: a URL ends up in logs.

Source: Alibaba Cloud, "Include a V4 signature in the header" and "... V1 ...". Signatures of the official
SDKs are in tests/golden/oss_signatures.json.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import quote

import attrs

from virtiofsd_rafs.registry.secret import Secret

_REGIONAL = re.compile(r"oss-([a-z]{2}-[0-9a-z-]+?)(?:-internal)?\.aliyuncs\.com(?::\d+)?")
# Where endpoints are named without "oss-" (dual stack: cn-hangzhou.oss.aliyuncs.com).
_DUAL_STACK = re.compile(r"([a-z]{2}-[0-9a-z-]+)\.oss\.aliyuncs\.com(?::\d+)?")


@attrs.frozen
class Keys:
    """An access key, and the token that belongs to a temporary one."""

    key_id: str
    secret: Secret
    token: Secret | None = None


def region_of(endpoint: str) -> str:
    """The region that *endpoint* names (``cn-hangzhou``); empty when it names none, as an accelerated one."""
    match = _REGIONAL.fullmatch(endpoint) or _DUAL_STACK.fullmatch(endpoint)
    return match[1] if match else ""


def object_url(scheme: str, endpoint: str, bucket: str, key: str) -> str:
    """The URL of an object: the bucket is part of the host, or of the path when the host is an address."""
    path = quote(key, safe="/~")
    host = endpoint.rpartition(":")[0] if re.search(r":\d+$", endpoint) else endpoint
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return f"{scheme}://{bucket}.{endpoint}/{path}"
    return f"{scheme}://{endpoint}/{bucket}/{path}"


def sign_v4(
    bucket: str, key: str, keys: Keys, *, region: str, now: float
) -> tuple[tuple[tuple[str, str], ...], Secret]:
    """Headers and Authorization of a GET for *key* in *bucket*; *now* in seconds since the epoch."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/oss/aliyun_v4_request"
    headers = [("x-oss-content-sha256", "UNSIGNED-PAYLOAD"), ("x-oss-date", stamp)]
    if keys.token:
        headers.append(("x-oss-security-token", keys.token.reveal()))
    canonical = "\n".join(
        [
            "GET",
            f"/{quote(bucket, safe='~')}/{quote(key, safe='/~')}",
            "",  # no query
            *(f"{name}:{value.strip()}" for name, value in headers),
            "",
            "",  # no additional headers: neither Host nor Range is signed
            "UNSIGNED-PAYLOAD",
        ]
    )
    to_sign = f"OSS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signing_key = f"aliyun_v4{keys.secret.reveal()}".encode()
    for part in scope.split("/"):
        signing_key = _hmac(signing_key, part)
    signature = _hmac(signing_key, to_sign).hex()
    return tuple(headers), Secret(f"OSS4-HMAC-SHA256 Credential={keys.key_id}/{scope},Signature={signature}")


def sign_v1(bucket: str, key: str, keys: Keys, *, now: float) -> tuple[tuple[tuple[str, str], ...], Secret]:
    """Headers and Authorization of a GET for *key* in *bucket*; *now* in seconds since the epoch."""
    date = format_datetime(datetime.fromtimestamp(int(now), UTC), usegmt=True)
    headers = [("Date", date)]
    signed = ""
    if keys.token:
        headers.append(("x-oss-security-token", keys.token.reveal()))
        signed = f"x-oss-security-token:{keys.token.reveal()}\n"
    to_sign = f"GET\n\n\n{date}\n{signed}/{bucket}/{key}"
    mac = hmac.new(keys.secret.reveal().encode(), to_sign.encode(), hashlib.sha1).digest()
    return tuple(headers), Secret(f"OSS {keys.key_id}:{base64.b64encode(mac).decode()}")


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
