"""S3: where URLs lead, how often they are signed, where credentials come from, what refusals mean."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from aiohttp import web

from tests.sim.s3 import S3Gate, moto_server
from tests.sim.sources import Config
from tests.sim.web import ObjectSim, WebSim, error
from virtiofsd_rafs.backends import check_installed, open_source
from virtiofsd_rafs.backends.base import CredentialUpdate
from virtiofsd_rafs.backends.config import S3Backend
from virtiofsd_rafs.backends.http import HttpClient
from virtiofsd_rafs.backends.objects import ObjectSource
from virtiofsd_rafs.backends.s3 import S3Signer, base_url
from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    ConfigError,
    CredentialsExpired,
    NotFound,
    Throttled,
    Unreachable,
)
from virtiofsd_rafs.image.resolve import ResolvedImage
from virtiofsd_rafs.registry.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtiofsd_rafs.backends.base import BlobSource

DATA = bytes(range(256)) * 16
SECRET = "hunter2/+"


class Store(S3Gate):
    """The gate, with objects of its own instead of a server behind it."""

    def __init__(self, region: str = "us-east-1") -> None:
        super().__init__("", region)
        self.objects = ObjectSim()
        self.objects.objects["/layers/blob"] = DATA
        self.keys["AKIA1"] = (SECRET, None)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return self.check(request) or await self.objects.answer(request)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment where nothing says who we are."""
    import os

    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


def backend(store: WebSim, **settings: Any) -> S3Backend:
    return S3Backend(bucket="layers", endpoint=store.host, scheme="http", **settings)


def given(store: WebSim, secret: str = SECRET) -> S3Backend:
    return backend(store, access_key_id="AKIA1", access_key_secret=Secret(secret))


def source(config: S3Backend) -> BlobSource:
    return open_source(ResolvedImage("x", b""), Config(), config)


async def read(config: S3Backend) -> bytes:
    opened = source(config)
    try:
        return await opened.read_range("blob", 100, 50)
    finally:
        await opened.close()


@pytest.mark.parametrize(
    ("settings", "region", "endpoint_url", "url"),
    [
        ({}, "us-east-1", "", "https://layers.s3.us-east-1.amazonaws.com"),
        ({}, "cn-north-1", "", "https://layers.s3.cn-north-1.amazonaws.com.cn"),
        ({"path_style": True}, "eu-west-1", "", "https://s3.eu-west-1.amazonaws.com/layers"),
        ({"bucket": "with.dot"}, "eu-west-1", "", "https://s3.eu-west-1.amazonaws.com/with.dot"),
        ({"endpoint": "minio:9000", "scheme": "http"}, "r", "", "http://minio:9000/layers"),
        ({"endpoint": "s3.example", "path_style": False}, "r", "", "https://layers.s3.example"),
        ({"endpoint": "10.0.0.1:9000", "path_style": False}, "r", "", "https://10.0.0.1:9000/layers"),
        ({}, "r", "http://local:1", "http://local:1/layers"),
        ({"endpoint": "mine"}, "r", "http://local:1", "https://mine/layers"),
    ],
)
def test_urls(settings: dict[str, Any], region: str, endpoint_url: str, url: str) -> None:
    config = S3Backend(**{"bucket": "layers", **settings})
    assert base_url(config, region, endpoint_url) == url


async def test_one_signature_for_all_ranges(store: Store, aws: pytest.MonkeyPatch) -> None:
    opened = source(given(store))
    for offset in range(50):
        assert await opened.read_range("blob", offset, 10) == DATA[offset : offset + 10]
    assert await opened.blob_size("blob") == len(DATA)
    await opened.close()
    assert len(store.signatures) == 1
    assert len(store.seen) == 51
    assert all("Authorization" not in seen.headers for seen in store.seen)


async def test_a_url_is_signed_anew_before_it_ends(store: Store, aws: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    signer = S3Signer(given(store), clock=lambda: now[0])
    first = await signer.plan("blob")
    now[0] += 3400
    assert await signer.plan("blob") is first
    assert await signer.plan("other") is not first
    now[0] += 100
    assert await signer.plan("blob") is not first
    now[0] -= 10_000  # the clock was set
    again = await signer.plan("blob")
    assert await signer.plan("blob") is again


async def test_a_url_that_ended_all_the_same(store: Store, aws: pytest.MonkeyPatch) -> None:
    """The machine slept, or its clock is slow."""
    opened = source(given(store))
    assert await opened.read_range("blob", 0, 10) == DATA[:10]
    first = set(store.signatures)
    store.next_answers(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
    import asyncio

    await asyncio.sleep(1.01)  # signatures differ from second to second
    assert await opened.read_range("blob", 0, 10) == DATA[:10]
    assert len(store.signatures - first) == 1
    store.offset_s = 7200
    with pytest.raises(CredentialsExpired):
        await opened.read_range("blob", 0, 10)
    await opened.close()


async def test_keys_of_the_environment(store: Store, aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ACCESS_KEY_ID", "AKIA1")
    aws.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert await read(backend(store)) == DATA[100:150]


async def test_keys_endpoint_and_region_of_a_profile(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Store("ap-south-1") as store:
        (tmp_path / "config").write_text(
            f"[profile boot]\nregion = ap-south-1\nendpoint_url = http://{store.host}\n"
            f"aws_access_key_id = AKIA1\naws_secret_access_key = {SECRET}\n"
        )
        assert await read(S3Backend(bucket="layers", profile="boot")) == DATA[100:150]


async def test_a_profile_that_is_not_there(store: Store, aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuthError, match="profile \\(nobody\\)") as e:
        await read(backend(store, profile="nobody"))
    assert "AWS_PROFILE" in e.value.remedy


async def test_temporary_keys_of_a_service_are_renewed(store: Store, aws: pytest.MonkeyPatch) -> None:
    """What containers and machines get: keys that end, from a service that gives new ones."""
    asked = []

    class Service(WebSim):
        async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
            asked.append(request.path)
            serial = len(asked)
            store.keys[f"ASIA{serial}"] = (f"key{serial}", f"token{serial}")
            # So near its end that botocore asks again with every use.
            end = datetime.now(UTC) + timedelta(seconds=2 if serial == 1 else 7200)
            return web.json_response(
                {
                    "AccessKeyId": f"ASIA{serial}",
                    "SecretAccessKey": f"key{serial}",
                    "Token": f"token{serial}",
                    "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            )

    with Service() as service:
        aws.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://{service.host}/creds")
        opened = source(backend(store))
        for offset in range(10):
            assert await opened.read_range("blob", offset, 10) == DATA[offset : offset + 10]
        await opened.close()
    assert asked == ["/creds", "/creds"]


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A security token service, at this URL."""
    with moto_server(tmp_path_factory.mktemp("moto")) as url:
        yield url


def learn(store: Store, moto: str) -> list[str]:
    """Tells the gate which keys the service has given; the ARNs of their roles."""
    with urllib.request.urlopen(f"{moto}/moto-api/data.json", timeout=30) as reply:
        roles = json.load(reply)["sts"]["AssumedRole"]
    for role in roles:
        store.keys[role["access_key_id"]] = (role["secret_access_key"], role["session_token"])
    return [role["role_arn"] for role in roles]


async def learnt(config: S3Backend, store: Store, moto: str) -> list[str]:
    """The roles, after reads: the first one is refused by a gate that does not know their keys yet."""
    opened = source(config)
    try:
        with pytest.raises(BackendError):
            await opened.read_range("blob", 100, 50)
        roles = await asyncio.to_thread(learn, store, moto)
        assert await opened.read_range("blob", 100, 50) == DATA[100:150]
    finally:
        await opened.close()
    return roles


async def test_web_identity(store: Store, aws: pytest.MonkeyPatch, tmp_path: Path, moto: str) -> None:
    """What pods get: a token in a file, to be exchanged for the keys of a role."""
    (tmp_path / "token").write_text("a token of the cluster")
    aws.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pod")
    aws.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    aws.setenv("AWS_ENDPOINT_URL_STS", moto)
    aws.setenv("AWS_REGION", "us-east-1")
    assert "arn:aws:iam::123456789012:role/pod" in await learnt(backend(store), store, moto)


async def test_an_assumed_role(store: Store, aws: pytest.MonkeyPatch, tmp_path: Path, moto: str) -> None:
    (tmp_path / "config").write_text(
        "[profile reader]\nrole_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = me\n"
        "region = us-east-1\n[profile me]\naws_access_key_id = AKIA2\naws_secret_access_key = x\n"
    )
    aws.setenv("AWS_ENDPOINT_URL_STS", moto)
    config = backend(store, profile="reader")
    assert "arn:aws:iam::123456789012:role/reader" in await learnt(config, store, moto)


async def test_no_credentials(store: Store, aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuthError, match="AccessDenied, 403") as e:
        await read(backend(store))
    assert "AWS_ACCESS_KEY_ID" in e.value.remedy


async def test_a_public_bucket(aws: pytest.MonkeyPatch) -> None:
    with ObjectSim() as public:
        public.objects["/layers/blob"] = DATA
        assert await read(backend(public)) == DATA[100:150]
        assert "X-Amz" not in public.seen[0].path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"access_key_id": "AKIA9"}, "does not know the access key id"),
        ({"access_key_secret": Secret("wrong")}, "the secret does not fit"),
        ({"session_token": Secret("wrong")}, "the session token is not valid"),
    ],
)
async def test_wrong_keys(store: Store, aws: pytest.MonkeyPatch, change: dict[str, Any], told: str) -> None:
    with pytest.raises(AuthError, match=told) as e:
        await read(attrs.evolve(given(store), **change))
    assert "the configuration" in e.value.remedy
    assert len(store.seen) == 1  # there is nothing to try again with


async def test_the_api_gives_new_keys(store: Store, aws: pytest.MonkeyPatch) -> None:
    opened = source(given(store, "old"))
    assert isinstance(opened, ObjectSource)
    with pytest.raises(AuthError):
        await opened.read_range("blob", 0, 1)
    opened.renew(CredentialUpdate(access_key_id="AKIA1", access_key_secret=Secret(SECRET)))
    assert await opened.read_range("blob", 0, 1) == DATA[:1]
    store.keys = {"ASIA2": ("s", "t")}
    opened.renew(
        CredentialUpdate(access_key_id="ASIA2", access_key_secret=Secret("s"), security_token=Secret("t"))
    )
    assert await opened.read_range("blob", 1, 1) == DATA[1:2]
    await opened.close()


@pytest.mark.parametrize("by_header", [False, True])
async def test_a_bucket_in_another_region(aws: pytest.MonkeyPatch, by_header: bool) -> None:
    with Store("eu-west-1") as store:
        if by_header:
            store.next_answers(
                301, b"<Error><Code>PermanentRedirect</Code></Error>", x_amz_bucket_region="eu-west-1"
            )
        assert await read(given(store)) == DATA[100:150]
        assert [seen.status for seen in store.seen] == [301 if by_header else 400, 206]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchBucket", NotFound),
        (404, "NoSuchKey", NotFound),
        (503, "SlowDown", Throttled),
        (500, "InternalError", Unreachable),
        (403, "RequestTimeTooSkewed", AuthError),
        (403, "AccessDenied", AuthError),
        (400, "ExpiredToken", CredentialsExpired),
        (418, "", BackendError),
    ],
)
async def test_refusals(
    store: Store, aws: pytest.MonkeyPatch, status: int, code: str, kind: type[BackendError]
) -> None:
    store.next_answers(status, f"<Error><Code>{code}</Code></Error>".encode(), times=3)
    with pytest.raises(kind) as e:
        await read(given(store))
    assert code in str(e.value)
    assert SECRET not in str(e.value)
    assert "Signature=" not in str(e.value)


async def test_a_long_body_of_a_refusal_is_not_waited_for(store: Store, aws: pytest.MonkeyPatch) -> None:
    store.next_answers(403, b"x" * (1 << 20))
    with pytest.raises(AuthError):
        await read(given(store))


def test_nothing_of_botocore_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, asyncio, virtiofsd_rafs.cli.serve\n"
        "from virtiofsd_rafs.backends.location import parse_blob_source\n"
        "from virtiofsd_rafs.backends import check_installed\n"
        "b = parse_blob_source('s3://bucket'); check_installed(b)\n"
        "import virtiofsd_rafs.backends.s3\n"
        "print([m for m in sys.modules if 'boto' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtiofsd_rafs.backends.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'virtiofsd-rafs[s3]'")):
        check_installed(S3Backend(bucket="layers"))
    with pytest.raises(ConfigError, match=re.escape("virtiofsd-rafs[s3]")):
        source(S3Backend(bucket="layers"))


def test_secrets_are_not_shown(store: Store) -> None:
    assert SECRET not in repr(given(store))
    assert SECRET not in json.dumps(attrs.asdict(given(store)), default=repr)


async def test_plans_do_not_show_signatures(store: Store, aws: pytest.MonkeyPatch) -> None:
    plan = await S3Signer(given(store)).plan("blob")
    assert "X-Amz-Signature" in plan.url
    assert "X-Amz" not in repr(plan)


async def test_the_gate_itself_refuses(store: Store) -> None:
    """A test server that lets everything through would prove nothing."""
    from virtiofsd_rafs.registry.protocol import Request

    http = HttpClient()
    for query in (
        "",
        "?X-Amz-Signature=0&X-Amz-Credential=AKIA1/20260101/us-east-1/s3/aws4_request"
        "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=604800&X-Amz-SignedHeaders=host",
    ):
        async with await http.open(
            Request("GET", f"http://{store.host}/layers/blob{query}", (), authorize=False), None
        ) as reply:
            assert reply.head.status == 403
    await http.close()
    assert error(403, "X").status == 403
