"""Alibaba Cloud OSS on loopback, as far as a reader needs it: it verifies signatures of both versions.

The verification is written from the documentation and shares nothing with the code under test.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import re
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tests.sim.web import ObjectSim, error

if TYPE_CHECKING:
    from aiohttp import web

# The store refuses requests whose time differs more than this from its own.
MAX_SKEW_S = 15 * 60
_V4 = re.compile(
    r"OSS4-HMAC-SHA256 Credential=(?P<id>[^/,]+)/(?P<date>\d{8})/(?P<region>[0-9a-z-]+)/oss/"
    r"aliyun_v4_request,(?: ?AdditionalHeaders=(?P<more>[^,]*),)? ?Signature=(?P<signature>[0-9a-f]{64})"
)
_V1 = re.compile(r"OSS (?P<id>[^:]+):(?P<signature>[A-Za-z0-9+/]+=*)")


class OssSim(ObjectSim):
    """One bucket behind an address, so that its name is the path's first part.

    ``keys`` maps access key ids to (secret, token or None); ``expired`` holds ids of temporary keys that have
    ended. Requests without a signature are refused.
    """

    def __init__(self, bucket: str, region: str) -> None:
        super().__init__()
        self.bucket = bucket
        self.region = region
        self.keys: dict[str, tuple[str, str | None]] = {}
        self.expired: set[str] = set()
        self.versions: list[str] = []
        """Of the signatures that came."""
        self.check = self._verify

    def put(self, key: str, data: bytes) -> None:
        """Stores an object."""
        self.objects[f"/{self.bucket}/{quote(key, safe='/~')}"] = data

    def _verify(self, request: web.BaseRequest) -> web.StreamResponse | None:
        sent = request.headers.get("Authorization", "")
        v4, v1 = _V4.fullmatch(sent), _V1.fullmatch(sent)
        match = v4 or v1
        if match is None:
            return error(403, "AccessDenied", Message="Anonymous access is forbidden for this operation.")
        self.versions.append("v4" if v4 else "v1")
        key_id = match["id"]
        if key_id in self.expired:
            return error(403, "SecurityTokenExpired", Message="The security token you provided has expired.")
        known = self.keys.get(key_id)
        if known is None:
            return error(403, "InvalidAccessKeyId", Message="The Access Key Id does not exist.")
        secret, token = known
        if request.headers.get("x-oss-security-token") != token:
            return error(403, "InvalidSecurityToken", Message="The security token is not valid.")
        when = self._time(request, v4 is not None)
        if when is None or abs(when - datetime.datetime.now(datetime.UTC).timestamp()) > MAX_SKEW_S:
            return error(403, "RequestTimeTooSkewed", Message="The time differs too much.")
        wanted = self._v4(request, v4, secret) if v4 else self._v1(request, secret)
        if not hmac.compare_digest(wanted, match["signature"]):
            return error(403, "SignatureDoesNotMatch", Message="The signature does not match.")
        return None

    @staticmethod
    def _time(request: web.BaseRequest, v4: bool) -> float | None:
        try:
            if v4:
                text = request.headers["x-oss-date"]
                parsed = datetime.datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
                return parsed.timestamp()
            return parsedate_to_datetime(request.headers["Date"]).timestamp()
        except (KeyError, ValueError):
            return None

    @staticmethod
    def _signed_headers(request: web.BaseRequest, names: tuple[str, ...]) -> list[tuple[str, str]]:
        every = [(name.lower(), value.strip()) for name, value in request.headers.items()]
        return sorted((n, v) for n, v in every if n.startswith("x-oss-") or n in names)

    def _v4(self, request: web.BaseRequest, sent: re.Match[str], secret: str) -> str:
        path, _, query = request.raw_path.partition("?")
        headers = self._signed_headers(request, ("content-type", "content-md5"))
        canonical = (
            f"{request.method}\n{path}\n{query}\n"
            + "".join(f"{n}:{v}\n" for n, v in headers)
            + f"\n{sent['more'] or ''}\n{request.headers.get('x-oss-content-sha256', '')}"
        )
        scope = f"{sent['date']}/{self.region}/oss/aliyun_v4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"OSS4-HMAC-SHA256\n{request.headers.get('x-oss-date', '')}\n{scope}\n{digest}"
        key = b"aliyun_v4" + secret.encode()
        for part in (sent["date"], self.region, "oss", "aliyun_v4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()

    def _v1(self, request: web.BaseRequest, secret: str) -> str:
        headers = "".join(f"{n}:{v}\n" for n, v in self._signed_headers(request, ()))
        resource = unquote(request.raw_path.partition("?")[0])
        kind, md5, date = (request.headers.get(n, "") for n in ("Content-Type", "Content-MD5", "Date"))
        text = f"{request.method}\n{md5}\n{kind}\n{date}\n{headers}{resource}"
        return base64.b64encode(hmac.digest(secret.encode(), text.encode(), "sha1")).decode()
