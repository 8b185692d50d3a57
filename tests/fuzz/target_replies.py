"""Invariant: any reply of a registry or token service is used or refused, and credentials go nowhere else.

Replies of object stores (redirects, signed URLs) and of credential helpers are among them.
"""

from __future__ import annotations

import json

from virtiofsd_rafs.errors import VirtiofsdRafsError
from virtiofsd_rafs.registry.auth import Authenticator, Credentials, Ready
from virtiofsd_rafs.registry.challenge import parse_challenges
from virtiofsd_rafs.registry.helper import helper_program, parse_helper_reply
from virtiofsd_rafs.registry.protocol import Endpoint, Exchange, ReplyHead, Step, origin, plan_range_body
from virtiofsd_rafs.registry.redirects import RedirectCache, expiry
from virtiofsd_rafs.registry.reference import parse_reference
from virtiofsd_rafs.registry.secret import Secret

NOW = 1_700_000_000.0
REFERENCE = parse_reference("registry.example/team/app:v1")
HOPS = 12


def _heads(data: bytes) -> list[ReplyHead]:
    """Replies: a line with the status, lines with fields, a line without anything."""
    heads = []
    for block in data.decode("latin-1").split("\n\n")[:HOPS]:
        first, *lines = block.split("\n")
        status = int(first) if first.isascii() and first.isdigit() and len(first) < 6 else 200
        fields = [line.partition(":")[::2] for line in lines]
        heads.append(ReplyHead.of(status, [(name.strip(), value.strip()) for name, value in fields]))
    return heads


def _range(heads: list[ReplyHead]) -> None:
    for head in heads:
        plan = plan_range_body(head, 4096, 100, what="blob", now=NOW)
        assert (plan.skip, plan.count) in ((0, 100), (4096, 100))


def _exchange(heads: list[ReplyHead], *, plain_http: bool) -> None:
    endpoint = Endpoint.of(REFERENCE, plain_http=plain_http)
    exchange = Exchange(endpoint, "GET", endpoint.blob_url("sha256:" + "1" * 64))
    authenticator = Authenticator(endpoint.base, "repository:team/app:pull", Credentials("u", Secret("p")))
    refusals = 0
    for head in heads:
        request = exchange.request()
        if origin(request.url) != origin(endpoint.base):
            assert not request.authorize, "credentials for somebody else"
        step = exchange.on_reply(head)
        if step is Step.REFUSED:
            refusals += 1
            authenticator.refused(None, exchange.challenges(), refusals=refusals, now=NOW)
            plan = authenticator.plan(NOW)
            if not isinstance(plan, Ready):
                assert plan.where
        elif step is Step.FINAL:
            return


def _token(heads: list[ReplyHead], body: bytes) -> None:
    authenticator = Authenticator(
        "https://registry.example/", "repository:team/app:pull", Credentials("u", Secret("p"))
    )
    challenge = parse_challenges(['Bearer realm="https://auth.example/token",service="s"'])
    authenticator.refused(None, challenge, refusals=1, now=NOW)
    request = authenticator.plan(NOW)
    assert not isinstance(request, Ready)
    if authenticator.token_reply(request, heads[0], body, now=NOW, wall=NOW):
        plan = authenticator.plan(NOW)
        assert isinstance(plan, Ready)
        assert plan.authorization is not None
        assert "\n" not in plan.authorization.reveal()


def run(data: bytes) -> None:
    """The first byte chooses the reader; replies have a form of their own, see ``_heads``."""
    kind, data = data[:1], data[1:]
    try:
        match kind[0] % 7 if kind else 0:
            case 0:
                _range(_heads(data))
            case 1:
                _exchange(_heads(data), plain_http=False)
            case 2:
                _exchange(_heads(data), plain_http=True)
            case 3:
                head, _, body = data.partition(b"\n\n")
                _token(_heads(head), body)
            case 4:
                url = data.decode("latin-1")
                assert expiry(url, now=NOW) is not None
                cache = RedirectCache()
                cache.put("blob", url, now=NOW)
                cache.get("blob", now=NOW)
            case 5:
                parse_helper_reply("pass", 0, data)
            case _:
                program = helper_program(data.decode("latin-1"))
                assert "/" not in program
    except VirtiofsdRafsError as e:
        _ = str(e)


def seeds() -> list[bytes]:
    """Whole and partial content, redirects, challenges, tokens, signed URLs."""
    signed = "https://store.example/x?X-Amz-Date=20231114T221320Z&X-Amz-Expires=900&X-Amz-Signature=00"
    token = json.dumps({"token": "abc", "expires_in": 300, "issued_at": "2023-11-14T22:13:20Z"})
    texts = [
        (0, "206\ncontent-range: bytes 4096-4195/10000\ncontent-length: 100"),
        (0, "200\ncontent-length: 5000"),
        (0, "416\ncontent-range: bytes */7"),
        (0, "429\nretry-after: 5"),
        (0, "503\nretry-after: Tue, 14 Nov 2023 22:15:20 GMT"),
        (1, f"307\nlocation: {signed}\n\n200"),
        (1, "302\nlocation: /v2/other\n\n401\nwww-authenticate: Basic realm=x\n\n200"),
        (1, "302\nlocation: //u@h:99/\n\n302\nlocation: http://h/\n\n403"),
        (2, "302\nlocation: http://[::1]:80/x\n\n403"),
        (1, '401\nwww-authenticate: Bearer realm="https://a.example/t?x=y",service="s",scope="a b"\n\n200'),
        (3, f"200\ncontent-type: application/json\n\n{token}"),
        (3, '200\n\n{"access_token": "t", "expires_in": "60"}'),
        (4, signed),
        (4, "https://a.blob.example/?se=2023-11-14T22:13:20Z&sig=x"),
        (4, "https://oss.example/x?Expires=1700000900&Signature=x"),
        (5, '{"ServerURL": "x", "Username": "<token>", "Secret": "s"}'),
        (6, "ecr-login"),
    ]
    return [bytes([kind]) + text.encode() for kind, text in texts]
