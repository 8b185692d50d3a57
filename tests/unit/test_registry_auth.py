"""Challenges, credentials, and the steps of authentication."""

from __future__ import annotations

import base64
import json
import pickle
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.errors import AuthError, BadReply, Throttled, Unreachable
from virtiofsd_rafs.registry.auth import (
    MAX_REFUSALS,
    Authenticator,
    Credentials,
    Ready,
    TokenRequest,
)
from virtiofsd_rafs.registry.challenge import Challenge, parse_challenges
from virtiofsd_rafs.registry.docker_config import parse_docker_config
from virtiofsd_rafs.registry.protocol import ReplyHead
from virtiofsd_rafs.registry.secret import Secret

REALM = "https://auth.example/token"
BEARER = [Challenge("bearer", {"realm": REALM, "service": "reg", "scope": "repository:a/b:pull"})]
BASIC = [Challenge("basic", {"realm": "x"})]
ME = Credentials("me", Secret("hunter2"))
OK = ReplyHead.of(200, [])


def make(credentials: Credentials | None = None, *, url: str = "https://reg.example/v2/a/b") -> Authenticator:
    return Authenticator(url, "repository:a/b:pull", credentials)


def token_body(token: str = "t0k3n", **more: object) -> bytes:
    return json.dumps({"token": token, **more}).encode()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="x"', [Challenge("basic", {"realm": "x"})]),
        ("Negotiate", [Challenge("negotiate")]),
        (
            'Bearer realm="https://a/t",service=s , scope="r:a:pull,push", Basic realm="q\\"z"',
            [
                Challenge("bearer", {"realm": "https://a/t", "service": "s", "scope": "r:a:pull,push"}),
                Challenge("basic", {"realm": 'q"z'}),
            ],
        ),
        ("NTLM TlRMTQ==, Basic realm=x", [Challenge("ntlm"), Challenge("basic", {"realm": "x"})]),
        (', ,Basic realm = "x"', [Challenge("basic", {"realm": "x"})]),
        ('Bearer realm="unfinished', [Challenge("bearer")]),
        ('"', []),
        ("", []),
    ],
)
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges([header]) == expected


@given(st.lists(st.text(alphabet=' ,="\\abZ09/+.', max_size=60), max_size=3))
def test_parsing_challenges_is_total(headers: list[str]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme


def test_a_secret_shows_stars() -> None:
    secret = Secret("hunter2")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", "%s" % secret, repr(ME)]  # noqa: UP031
    assert not any("hunter2" in text for text in shown)
    assert secret == Secret("hunter2")
    assert secret != Secret("hunter3")
    assert secret.reveal() == "hunter2"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_anonymous_comes_first_even_with_credentials() -> None:
    assert make(ME).plan(0) == Ready(None)


def test_basic() -> None:
    auth = make(ME)
    auth.refused(None, BASIC, refusals=1)
    plan = auth.plan(0)
    assert isinstance(plan, Ready)
    assert plan.authorization is not None
    assert plan.authorization.reveal() == "Basic " + base64.b64encode(b"me:hunter2").decode()
    with pytest.raises(AuthError, match="refuses the user and password"):
        auth.refused(plan.authorization, BASIC, refusals=2)


def test_basic_without_credentials_names_the_remedy() -> None:
    with pytest.raises(AuthError, match="docker login"):
        make().refused(None, BASIC, refusals=1)


def test_where_refused_credentials_came_from_is_told() -> None:
    auth = make()
    assert auth.use(ME, origin="the credential helper pass")
    auth.refused(None, BASIC, refusals=1)
    with pytest.raises(AuthError, match="the credential helper pass"):
        auth.refused(ME.basic(), BASIC, refusals=2)


def test_bearer_anonymous() -> None:
    auth = make()
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    assert request.authorization is None
    assert request.form is None
    assert request.url.startswith(REALM + "?")
    assert parse_qs(urlsplit(request.url).query) == {"service": ["reg"], "scope": ["repository:a/b:pull"]}
    auth.token_reply(request, OK, token_body(expires_in=100), now=10, wall=0)
    plan = auth.plan(10)
    assert isinstance(plan, Ready)
    assert plan.authorization == Secret("Bearer t0k3n")
    # Renewed before it ends, beside requests that still use it; at its very end nothing else helps.
    assert auth.plan(10 + 66) == Ready(Secret("Bearer t0k3n"))
    early = auth.plan(10 + 67)
    assert isinstance(early, Ready)
    assert early.authorization == Secret("Bearer t0k3n")
    assert early.renew is not None
    assert isinstance(auth.plan(10 + 97.9), Ready)
    assert auth.plan(10 + 98.1) == early.renew


def test_bearer_with_password_sends_it_to_the_realm_only() -> None:
    auth = make(ME)
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    assert request.authorization == ME.basic()
    assert parse_qs(urlsplit(request.url).query)["account"] == ["me"]
    assert "hunter2" not in repr(request) + request.where


def test_identity_token_goes_by_post_and_falls_back() -> None:
    auth = make(Credentials("me", Secret("hunter2"), Secret("refresh-me")))
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    assert request.form is not None
    assert parse_qs(request.form.reveal())["refresh_token"] == ["refresh-me"]
    assert "refresh-me" not in repr(request)
    auth.token_reply(request, ReplyHead.of(404, []), b"", now=0, wall=0)
    again = auth.plan(0)
    assert isinstance(again, TokenRequest)
    assert again.form is None
    assert again.authorization == ME.basic()


def test_an_expired_token_is_dropped_and_a_newer_one_is_kept() -> None:
    auth = make()
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    auth.token_reply(request, OK, token_body("first"), now=0, wall=0)
    # Two requests were refused with the old token. The first to come back renews it, the second must not
    # drop the new one.
    auth.refused(Secret("Bearer first"), BEARER, refusals=1)
    request = auth.plan(1)
    assert isinstance(request, TokenRequest)
    auth.token_reply(request, OK, token_body("second"), now=1, wall=0)
    auth.refused(Secret("Bearer first"), BEARER, refusals=1)
    assert auth.plan(1) == Ready(Secret("Bearer second"))


def test_endless_refusals_end() -> None:
    auth = make()
    for n in range(1, MAX_REFUSALS):
        auth.refused(None, BEARER, refusals=n)
    with pytest.raises(AuthError):
        auth.refused(None, BEARER, refusals=MAX_REFUSALS)


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AuthError), (403, AuthError), (429, Throttled), (500, Unreachable), (302, BadReply)],
)
def test_token_service_fails(status: int, error: type[Exception]) -> None:
    auth = make()
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    with pytest.raises(error):
        auth.token_reply(request, ReplyHead.of(status, []), b"", now=0, wall=0)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}']
)
def test_token_service_sends_nonsense(body: bytes) -> None:
    auth = make()
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    with pytest.raises(BadReply):
        auth.token_reply(request, OK, body, now=0, wall=0)


@pytest.mark.parametrize(
    ("more", "life"),
    [
        ({"expires_in": 300}, 298),
        ({}, 58),
        ({"expires_in": 0}, 58),
        ({"expires_in": "soon"}, 58),
        ({"expires_in": 0.001}, 0.9),  # or each request would be two, for ever
        ({"expires_in": 300, "issued_at": "1970-01-01T00:01:40.123456789Z"}, 198),
        ({"expires_in": 300, "issued_at": "1970-01-01T01:00:00Z"}, 298),  # a clock that is ahead
        ({"expires_in": 300, "issued_at": "yesterday"}, 298),
    ],
)
def test_life_of_tokens(more: dict[str, object], life: float) -> None:
    auth = make()
    auth.refused(None, BEARER, refusals=1)
    request = auth.plan(0)
    assert isinstance(request, TokenRequest)
    auth.token_reply(request, OK, token_body(**more), now=0, wall=200)
    assert isinstance(auth.plan(life - 0.2), Ready)
    assert isinstance(auth.plan(life + 0.2), TokenRequest)


def test_tokens_are_not_asked_over_http_for_an_https_registry() -> None:
    challenge = [Challenge("bearer", {"realm": "http://auth.example/token"})]
    with pytest.raises(AuthError, match="not encrypted"):
        make(ME).refused(None, challenge, refusals=1)
    make(ME, url="http://reg.example/v2/a").refused(None, challenge, refusals=1)


@pytest.mark.parametrize("realm", ["", "ftp://x/", "https://me:pw@auth.example/t", "https://[bad/"])
def test_odd_realms(realm: str) -> None:
    with pytest.raises((AuthError, BadReply)):
        make(ME).refused(None, [Challenge("bearer", {"realm": realm})], refusals=1)


def test_unknown_schemes_are_named() -> None:
    with pytest.raises(AuthError, match="negotiate"):
        make(ME).refused(None, [Challenge("negotiate")], refusals=1)


def _auth(pair: str) -> str:
    return base64.b64encode(pair.encode()).decode()


def test_docker_config() -> None:
    config = parse_docker_config(
        json.dumps(
            {
                "auths": {
                    "https://index.docker.io/v1/": {"auth": _auth("hub:pw:with:colons")},
                    "reg.example:5000": {"username": "u", "password": "p"},
                    "http://other.example/v2/": {"auth": _auth("o:p"), "identitytoken": "it"},
                    "empty.example": {},
                    "odd.example": "text",
                },
                "credHelpers": {"gcr.io": "gcloud"},
                "credsStore": "pass",
                "HttpHeaders": {"X": "y"},
            }
        ).encode()
    )
    hub = config.lookup("docker.io")
    assert hub is not None
    assert (hub.username, hub.password.reveal()) == ("hub", "pw:with:colons")
    assert config.lookup("reg.example:5000") == Credentials("u", Secret("p"))
    other = config.lookup("other.example")
    assert other is not None
    assert other.identity_token == Secret("it")
    assert config.lookup("empty.example") is None
    assert config.lookup("odd.example") is None
    assert config.lookup("reg.example") is None
    assert config.helper("gcr.io") == "gcloud"
    assert config.helper("reg.example") is None
    assert config.default_helper == "pass"
    assert parse_docker_config(b"{}").lookup("docker.io") is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"auths": {"h": {"auth": "!!hunter2"}}}', '{"auths": {"h": {"auth": "aHVudGVyMg=="}}}'],
)
def test_docker_config_that_is_broken(text: str) -> None:
    with pytest.raises(AuthError) as e:
        parse_docker_config(text.encode())
    assert "hunter2" not in str(e.value)
    assert "aHVudGVyMg" not in str(e.value)


@given(st.binary(max_size=200))
def test_docker_config_of_any_bytes(data: bytes) -> None:
    try:
        parse_docker_config(data)
    except AuthError:
        return
