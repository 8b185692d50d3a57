"""Records requests that the official SDKs of Alibaba Cloud OSS sign, for tests/golden/oss_signatures.json.

Runs in an environment of its own, because nothing here needs the SDKs:

    python3 -m venv /tmp/oss && /tmp/oss/bin/pip install oss2 alibabacloud-oss-v2
    /tmp/oss/bin/python tests/golden/record_oss_signatures.py > tests/golden/oss_signatures.json

Each SDK is asked for an object at a fixed time with fixed keys (made up), and the request that it would send
is caught before it leaves: method, URL and headers. Nothing is sent.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import types
from email.utils import formatdate
from typing import Any

import alibabacloud_oss_v2 as v2
import alibabacloud_oss_v2.signer.v1
import alibabacloud_oss_v2.signer.v4
import oss2
import oss2.auth

NOW = datetime.datetime(2024, 2, 29, 23, 59, 58, tzinfo=datetime.UTC)
KEY_ID, SECRET, TOKEN = "LTAI5tNotARealKeyId", "NotARealSecret0123456789abcdef", "CAISnot+a/real=token=="
BUCKET = "layers-1"
BLOB = "3f" * 32
KEYS = [
    BLOB,
    f"nydus/{BLOB}",
    "with space/and+plus",
    "ümläut/日本",
    "percent%2Fand?question&x=1#y",
    "(brackets)!'*~_-.",
    "//two slashes",
]
ENDPOINTS = [
    ("oss-cn-hangzhou.aliyuncs.com", "cn-hangzhou"),
    ("oss-eu-central-1-internal.aliyuncs.com", "eu-central-1"),
]


class Caught(Exception):
    """The request that would have been sent."""


class FixedTime(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return NOW.astimezone(tz) if tz else NOW.replace(tzinfo=None)

    @classmethod
    def utcnow(cls) -> datetime.datetime:
        return NOW.replace(tzinfo=None)


def stop_the_clock() -> None:
    """Makes both SDKs believe that it is NOW."""
    fixed = types.SimpleNamespace(
        datetime=FixedTime, timezone=datetime.timezone, timedelta=datetime.timedelta
    )
    alibabacloud_oss_v2.signer.v1.datetime = fixed
    alibabacloud_oss_v2.signer.v4.datetime = fixed
    oss2.auth.datetime = FixedTime
    oss2.utils.http_date = lambda timeval=None: formatdate(NOW.timestamp(), usegmt=True)


class CatchingClient(v2.types.HttpClient):
    def send(self, request: Any, **_: Any) -> Any:
        raise Caught(request.url, dict(request.headers))

    def open(self) -> None: ...

    def close(self) -> None: ...


class CatchingSession:
    def do_request(self, request: Any, timeout: Any) -> Any:
        raise Caught(request.url, dict(request.headers))


def caught(call: Any) -> dict[str, Any]:
    try:
        call()
    except Exception as e:
        error: BaseException | None = e
        while error is not None and not isinstance(error, Caught):
            error = error.__cause__ or error.__context__ or getattr(error, "_error", None)
        if error is None:
            raise
        url, headers = error.args
    return {
        "url": url,
        "headers": {
            name.lower(): str(value)
            for name, value in sorted(headers.items())
            if name.lower() in ("authorization", "date", "range") or name.lower().startswith("x-oss-")
        },
    }


def by_v2(version: str, key: str, token: str | None, endpoint: str, region: str) -> dict[str, Any]:
    config = v2.config.load_default()
    config.credentials_provider = v2.credentials.StaticCredentialsProvider(KEY_ID, SECRET, token)
    config.region, config.endpoint = region, endpoint
    config.signature_version = version
    config.http_client = CatchingClient()
    config.retry_max_attempts = 1
    client = v2.Client(config)
    request = v2.GetObjectRequest(bucket=BUCKET, key=key, range_header="bytes=10-19")
    return caught(lambda: client.get_object(request))


def by_oss2(version: str, key: str, token: str | None, endpoint: str, region: str) -> dict[str, Any]:
    provider = oss2.credentials.StaticCredentialsProvider(KEY_ID, SECRET, token)
    auth = oss2.ProviderAuthV4(provider) if version == "v4" else oss2.ProviderAuth(provider)
    bucket = oss2.Bucket(auth, f"https://{endpoint}", BUCKET, session=CatchingSession(), region=region)
    return caught(lambda: bucket.get_object(key, byte_range=(10, 19)))


def main() -> None:
    """Prints the file."""
    stop_the_clock()
    vectors = []
    for name, record in (("oss2", by_oss2), ("alibabacloud-oss-v2", by_v2)):
        sdk = f"{name} {importlib.metadata.version(name)}"
        for version in ("v1", "v4"):
            for endpoint, region in ENDPOINTS:
                for token in (None, TOKEN):
                    if (name, version) == ("alibabacloud-oss-v2", "v1") and token:
                        continue  # it sends the token under another name than the documentation
                    for key in KEYS:
                        vectors.append(
                            {
                                "sdk": sdk,
                                "version": version,
                                "endpoint": endpoint,
                                "region": region,
                                "key": key,
                                "token": token,
                                **record(version, key, token, endpoint, region),
                            }
                        )
    document = {
        "about": "GET of an object with a Range, signed by the official SDKs; see record_oss_signatures.py",
        "time": NOW.timestamp(),
        "bucket": BUCKET,
        "access_key_id": KEY_ID,
        "access_key_secret": SECRET,
    }
    lines = ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in vectors)
    print(json.dumps(document, indent=1)[:-2] + f',\n "vectors": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
