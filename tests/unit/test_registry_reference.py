"""References: docker's defaults, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.registry.reference import Reference, parse_reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nginx", Reference("docker.io", "library/nginx", "latest")),
        ("me/nginx:1.2", Reference("docker.io", "me/nginx", "1.2")),
        ("docker.io/nginx", Reference("docker.io", "library/nginx", "latest")),
        ("localhost/a", Reference("localhost", "a", "latest")),
        ("localhost:5000/a/b/c:v1", Reference("localhost:5000", "a/b/c", "v1")),
        ("ghcr.io/a/b", Reference("ghcr.io", "a/b", "latest")),
        ("UPPER/a", Reference("UPPER", "a", "latest")),
        (f"ghcr.io/a@{DIGEST}", Reference("ghcr.io", "a", None, DIGEST)),
        (f"ghcr.io/a:v1@{DIGEST}", Reference("ghcr.io", "a", "v1", DIGEST)),
        ("[::1]:5000/a__b/c--d.e:T_1", Reference("[::1]:5000", "a__b/c--d.e", "T_1")),
    ],
)
def test_parse(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


def test_docker_hub_is_served_elsewhere() -> None:
    assert parse_reference("nginx").api_host == "registry-1.docker.io"
    assert parse_reference("ghcr.io/a").api_host == "ghcr.io"


def test_digest_decides() -> None:
    assert parse_reference(f"h.io/a:v1@{DIGEST}").target == DIGEST
    assert parse_reference(f"h.io/a:v1@{DIGEST}").key == "h.io/a:v1"
    assert parse_reference(f"h.io/a@{DIGEST}").key == f"h.io/a@{DIGEST}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://ghcr.io/a",
        "ghcr.io/",
        "ghcr.io/A",
        "ghcr.io/a/../b",
        "ghcr.io/a//b",
        "ghcr.io/a:",
        "ghcr.io/a:-x",
        "ghcr.io/a:" + "t" * 129,
        "ghcr.io/a@sha256:abc",
        "ghcr.io/a@" + DIGEST.upper(),
        "ghcr.io/a@md5:" + "0" * 32,
        "ghcr.io:0/a",
        "ghcr.io:99999/a",
        "-x.io/a",
        "ghcr.io/" + "a" * 260,
        "h.io/a b",
        "h.io/a\n",
        "h.io/a:t\n",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_reference(text)


@pytest.mark.parametrize(
    "text", ["me:hunter2@ghcr.io/a", "https://me:hunter2@ghcr.io/a", "me:hun/hunter2@x@ghcr.io/a"]
)
def test_a_password_in_a_reference_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_reference(text)
    assert "hunter2" not in str(e.value)


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_a_config_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ConfigError:
        return
    assert parse_reference(str(reference)) == reference
