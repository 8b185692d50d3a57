"""Exchanges: every odd answer of a registry, as a value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BadReply,
    NotFound,
    RangeIgnored,
    Throttled,
    Unreachable,
)
from virtiofsd_rafs.registry.protocol import (
    MAX_REDIRECTS,
    MAX_RETRY_AFTER_S,
    BodyPlan,
    Endpoint,
    Exchange,
    ReplyHead,
    Step,
    plan_range_body,
    range_headers,
    retry_after,
    status_error,
    without_query,
)
from virtiofsd_rafs.registry.redirects import CLOCK_MARGIN_S, DEFAULT_TTL_S, RedirectCache, expiry
from virtiofsd_rafs.registry.upload import closing_url, upload_location

DIGEST = "sha256:" + "0a" * 32
ENDPOINT = Endpoint("reg.example", "a/b")
SIGNED = "https://store.example/x?X-Sig=a%2Fb%3D&y=1+2"


def head(status: int, **fields: str) -> ReplyHead:
    return ReplyHead.of(status, [(name.replace("_", "-"), value) for name, value in fields.items()])


def exchange(location: str | None = None, *, endpoint: Endpoint = ENDPOINT) -> Exchange:
    return Exchange(
        endpoint, "GET", endpoint.blob_url(DIGEST), headers=range_headers(5, 10), location=location
    )


def test_a_request_asks_for_identity_and_the_range() -> None:
    request = exchange().request()
    assert request.url == f"https://reg.example/v2/a/b/blobs/{DIGEST}"
    assert dict(request.headers) == {"Accept-Encoding": "identity", "Range": "bytes=5-14"}
    assert request.authorize


def test_plain_http_is_chosen_by_the_user_only() -> None:
    assert Endpoint("reg.example:5000", "a", plain_http=True).base == "http://reg.example:5000/v2/a"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/x?a=%2F+b%20c", "https://reg.example/x?a=%2F+b%20c"),
        (" ../y ", "https://reg.example/v2/a/b/y"),
        ("/a b", "https://reg.example/a%20b"),
        ("/\u00e9", "https://reg.example/%C3%A9"),
        ("/\udcff", "https://reg.example/%FF"),
    ],
)
def test_locations_stay_as_they_were_written(location: str, expected: str) -> None:
    x = exchange()
    x.on_reply(head(307, location=location))
    assert x.request().url == expected


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_goes_without_authorization(status: int) -> None:
    x = exchange()
    assert x.on_reply(head(status, location=SIGNED)) is Step.AGAIN
    request = x.request()
    assert request.url == SIGNED  # as it was written: quoting it again would break the signature
    assert not request.authorize
    assert ("Range", "bytes=5-14") in request.headers
    assert x.location == SIGNED
    assert "X-Sig" not in x.where


@pytest.mark.parametrize(
    ("location", "authorize"),
    [
        ("/v2/a/b/blobs/other", True),
        ("https://reg.example:443/x", True),
        ("https://REG.example/x", True),
        ("https://reg.example:444/x", False),
        ("https://reg.example.evil/x", False),
        ("//evil.example/x", False),
    ],
)
def test_authorization_goes_to_the_registrys_origin_only(location: str, authorize: bool) -> None:
    x = exchange()
    x.on_reply(head(307, location=location))
    assert x.request().authorize is authorize


@pytest.mark.parametrize(
    "location",
    [
        "http://reg.example/x",
        "file:///etc/passwd",
        "https://me:pw@store.example/",
        "https://[x/",
        "https://h:x/",
    ],
)
def test_redirects_that_are_refused(location: str) -> None:
    with pytest.raises(BadReply):
        exchange().on_reply(head(307, location=location))


def test_unencrypted_redirects_are_allowed_with_plain_http() -> None:
    x = exchange(endpoint=Endpoint("reg.example", "a/b", plain_http=True))
    assert x.on_reply(head(307, location="http://store.example/x")) is Step.AGAIN


def test_redirects_end() -> None:
    x = exchange()
    for n in range(MAX_REDIRECTS):
        assert x.on_reply(head(307, location=f"/{n}")) is Step.AGAIN
    with pytest.raises(BadReply, match="redirects"):
        x.on_reply(head(307, location="/again"))


def test_a_challenge_of_the_registry_is_handed_on() -> None:
    x = exchange()
    assert x.on_reply(head(401, www_authenticate='Basic realm="x"')) is Step.REFUSED
    assert [c.scheme for c in x.challenges()] == ["basic"]


def test_a_challenge_from_elsewhere_never_gets_credentials() -> None:
    x = exchange()
    x.on_reply(head(307, location=SIGNED))
    with pytest.raises(Unreachable, match="401"):
        x.on_reply(head(401, www_authenticate='Basic realm="x"'))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_cached_location_that_is_refused_is_asked_for_anew(status: int) -> None:
    x = exchange(SIGNED)
    assert not x.request().authorize
    assert x.on_reply(head(status)) is Step.AGAIN
    assert x.cache_refused
    assert x.request().url == ENDPOINT.blob_url(DIGEST)
    assert x.request().authorize
    # A second refusal is final: the registry's new URL is no better.
    x.on_reply(head(307, location=SIGNED + "&new"))
    if status in (401, 403):
        with pytest.raises(Unreachable):
            x.on_reply(head(status))
    else:
        assert x.on_reply(head(status)) is Step.FINAL


@pytest.mark.parametrize("status", [200, 206, 408, 416, 429, 500, 503])
def test_other_answers_from_a_cached_location_are_final(status: int) -> None:
    assert exchange(SIGNED).on_reply(head(status)) is Step.FINAL


def plan(reply: ReplyHead, offset: int = 100, length: int = 50, **more: int) -> BodyPlan:
    return plan_range_body(reply, offset, length, what="blob", now=0, **more)


def test_206() -> None:
    assert plan(head(206, content_range="bytes 100-149/1000", content_length="50")) == BodyPlan(
        0, 50, True, 1000
    )
    assert plan(head(206, content_range="bytes 100-149/*")) == BodyPlan(0, 50, True, None)


@pytest.mark.parametrize(
    "reply",
    [
        head(206),
        head(206, content_range="bytes 101-150/1000"),
        head(206, content_range="bytes 100-148/1000"),
        head(206, content_range="bytes 100-150/1000"),
        head(206, content_range="bytes 100-149/149"),
        head(206, content_range="items 100-149/1000"),
        head(206, content_range="bytes 100-149/1000", content_length="49"),
        head(206, content_range="bytes 100-149/1000", content_encoding="gzip"),
        head(206, content_type="multipart/byteranges; boundary=x"),
        head(206, content_range="bytes 100-149/" + "9" * 5000),
    ],
)
def test_206_that_is_not_what_was_asked_for(reply: ReplyHead) -> None:
    with pytest.raises(BadReply):
        plan(reply)


def test_200_is_cut() -> None:
    assert plan(head(200, content_length="1000")) == BodyPlan(100, 50, False, 1000)
    assert plan(head(200, content_length="150")) == BodyPlan(100, 50, True, 150)
    assert plan(head(200)) == BodyPlan(100, 50, False, None)


def test_200_that_is_too_short() -> None:
    with pytest.raises(BadReply, match="has 149 bytes"):
        plan(head(200, content_length="149"))


def test_200_is_given_up_when_the_slice_lies_deep() -> None:
    with pytest.raises(RangeIgnored):
        plan(head(200, content_length="100000"), max_skip=99)
    assert plan(head(200, content_length="100000"), max_skip=100).skip == 100


@pytest.mark.parametrize("reply", [head(416), head(416, content_range="bytes */120", content_length="99999")])
def test_416_is_told_by_its_status(reply: ReplyHead) -> None:
    with pytest.raises(BadReply, match="no bytes 100 to 149"):
        plan(reply)


@pytest.mark.parametrize(
    ("reply", "error", "retryable"),
    [
        (head(401), AuthError, False),
        (head(403), AuthError, False),
        (head(404), NotFound, False),
        (head(410), NotFound, False),
        (head(408), Unreachable, True),
        (head(429), Throttled, True),
        (head(500), Unreachable, True),
        (head(503), Unreachable, True),
        (head(503, retry_after="7"), Throttled, True),
        (head(418), BadReply, True),
        (head(204), BadReply, True),
    ],
)
def test_statuses(reply: ReplyHead, error: type[BackendError], retryable: bool) -> None:
    found = status_error(reply, "blob x", now=0)
    assert type(found) is error
    assert found.retryable is retryable
    assert "blob x" in str(found)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("999999", MAX_RETRY_AFTER_S),
        ("Thu, 01 Jan 1970 00:01:50 GMT", 10),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("soon", None),
        ("-1", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after(head(429, retry_after=value), now=100) == seconds


def test_urls_in_messages_are_bare() -> None:
    assert without_query("https://me:pw@h.example/x?sig=1#f") == "https://h.example/x"
    assert "[" not in without_query("https://[bad")


@given(
    st.integers(100, 599),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "Content-Range",
                    "content-length",
                    "Location",
                    "Retry-After",
                    "Content-Encoding",
                    "WWW-Authenticate",
                ]
            ),
            st.text(max_size=30) | st.from_regex(r"bytes \d+-\d+/\d+", fullmatch=True),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_reply_gives_a_step_a_plan_or_a_backend_error(
    status: int, fields: list[tuple[str, str]], cached: bool
) -> None:
    reply = ReplyHead.of(status, fields)
    try:
        step = exchange(SIGNED if cached else None).on_reply(reply)
        if step is Step.FINAL:
            wanted = plan(reply)
            assert wanted.count == 50
            assert wanted.skip in (0, 100)
    except BackendError:
        return


@pytest.mark.parametrize(
    ("query", "end"),
    [
        ("X-Amz-Date=19700101T001640Z&X-Amz-Expires=300", 1300),
        ("X-Goog-Date=19700101T001640Z&X-Goog-Expires=300", 1300),
        ("Expires=1700000000&OSSAccessKeyId=x", 1700000000),
        ("se=1970-01-01T00%3A30%3A00Z&sig=x", 1800),
    ],
)
def test_signed_urls_tell_their_end(query: str, end: float) -> None:
    assert expiry(f"https://s.example/x?{query}", now=1000) == end - CLOCK_MARGIN_S


@pytest.mark.parametrize("query", ["", "X-Amz-Expires=300", "Expires=soon", "se=99999-99", "a&" * 200])
def test_urls_without_an_end(query: str) -> None:
    assert expiry(f"https://s.example/x?{query}", now=1000) == 1000 + DEFAULT_TTL_S


def test_redirects_are_kept_until_they_end() -> None:
    cache = RedirectCache()
    cache.put("b", SIGNED, now=0)
    assert cache.get("b", now=DEFAULT_TTL_S - 1) == SIGNED
    cache.put("b", SIGNED, now=DEFAULT_TTL_S - 1)  # using it does not make it younger
    assert cache.get("b", now=DEFAULT_TTL_S) is None
    cache.put("b", SIGNED, now=0)
    cache.drop("b")
    cache.drop("b")
    assert cache.get("b", now=0) is None


def test_redirects_do_not_pile_up() -> None:
    cache = RedirectCache()
    for n in range(5000):
        cache.put(str(n), SIGNED, now=0)
    assert cache.get("0", now=0) is None
    assert cache.get("4999", now=0) == SIGNED


def test_uploads() -> None:
    start = ENDPOINT.uploads_url()
    there = upload_location(ENDPOINT, start, head(202, location="/v2/a/b/blobs/uploads/u?state=x%2F"))
    assert there == "https://reg.example/v2/a/b/blobs/uploads/u?state=x%2F"
    assert closing_url(there, DIGEST) == there + "&digest=sha256%3A" + "0a" * 32
    assert closing_url("https://h/u", DIGEST) == "https://h/u?digest=sha256%3A" + "0a" * 32


@pytest.mark.parametrize(
    "fields", [{}, {"location": "https://evil.example/u"}, {"location": "http://reg.example/u"}]
)
def test_an_upload_stays_at_its_registry(fields: dict[str, str]) -> None:
    with pytest.raises(BadReply):
        upload_location(ENDPOINT, ENDPOINT.uploads_url(), head(202, **fields))
