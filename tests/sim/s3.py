"""S3: moto's server as a process, and a gate before it that verifies presigned URLs, which moto does not.

The verification is written from the documentation ("Authenticating Requests: Using Query Parameters"), and
shares nothing with botocore.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.client
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote

from guest.registry import free_port
from tests.sim.web import GatewaySim, error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """A running moto; its ``http://host:port``."""
    port = free_port()
    program = Path(sys.executable).with_name("moto_server")
    log = folder / "moto.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MOTO_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/moto-api/")
                connection.getresponse().read()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


class S3Gate(GatewaySim):
    """Lets requests through to *upstream* that carry a good presigned URL of ``region``.

    ``keys`` maps access key ids to (secret, token or None); ``expired`` holds ids whose token has ended.
    Authorization beside a signed query is refused, as S3 does. ``offset_s`` moves the gate's clock.
    """

    def __init__(self, upstream: str, region: str = "us-east-1") -> None:
        super().__init__(upstream)
        self.region = region
        self.keys: dict[str, tuple[str, str | None]] = {}
        self.expired: set[str] = set()
        self.offset_s = 0.0
        self.signatures: set[str] = set()
        """Of the requests that came, to see how many were made."""
        self.check = self._verify

    def _verify(self, request: web.BaseRequest) -> web.StreamResponse | None:
        path, _, query = request.raw_path.partition("?")
        pairs = [p.partition("=")[::2] for p in query.split("&") if p]
        values = dict(parse_qsl(query, keep_blank_values=True))
        if "X-Amz-Signature" not in values:
            return error(403, "AccessDenied", Message="Access Denied")
        self.signatures.add(values["X-Amz-Signature"])
        if "Authorization" in request.headers:
            return error(400, "InvalidArgument", Message="Only one auth mechanism allowed")
        key_id, date, region, service, end = values["X-Amz-Credential"].split("/")
        if (service, end) != ("s3", "aws4_request") or region != self.region:
            return error(400, "AuthorizationQueryParametersError", Message="wrong region", Region=self.region)
        known = self.keys.get(key_id)
        if key_id in self.expired:
            return error(400, "ExpiredToken", Message="The provided token has expired.")
        if known is None:
            return error(403, "InvalidAccessKeyId", Message="The AWS Access Key Id does not exist.")
        secret, token = known
        if values.get("X-Amz-Security-Token") != token:
            return error(403, "InvalidToken", Message="The provided token is malformed.")
        signed_at = datetime.datetime.strptime(values["X-Amz-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
        age = time.time() + self.offset_s - signed_at.timestamp()
        if age > int(values["X-Amz-Expires"]):
            return error(403, "AccessDenied", Message="Request has expired", Expires="then")
        canonical_query = "&".join(f"{n}={v}" for n, v in sorted(pairs) if n != "X-Amz-Signature")
        canonical = (
            f"{request.method}\n{path}\n{canonical_query}\nhost:{request.headers['Host']}\n\nhost\n"
            "UNSIGNED-PAYLOAD"
        )
        assert values["X-Amz-SignedHeaders"] == "host"
        assert quote(values["X-Amz-Credential"], safe="") in query
        scope = f"{date}/{region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{values['X-Amz-Date']}\n{scope}\n{digest}"
        key = b"AWS4" + secret.encode()
        for part in (date, region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        if hmac.digest(key, text.encode(), "sha256").hex() != values["X-Amz-Signature"]:
            return error(403, "SignatureDoesNotMatch", Message="The signature does not match.")
        return None


def put_object(url: str, path: str, data: bytes = b"") -> None:
    """Stores an object (or makes a bucket) at moto's *url* itself, which asks for no signature."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("PUT", path, body=data)
    reply = connection.getresponse()
    body = reply.read()
    assert reply.status == 200, (reply.status, body)
