"""The options that say how registries are reached, as every command gets them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from virtiofsd_rafs.backends.config import HttpOptions, Mirror, ProxyOptions, RegistryAccess
from virtiofsd_rafs.cli._registry_options import registry_options
from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def parse() -> Callable[..., RegistryAccess | None]:
    """What a command gets for its arguments. Raises what it raises."""

    def parse(*arguments: str, env: dict[str, str] | None = None) -> RegistryAccess | None:
        got: list[RegistryAccess | None] = []

        @click.command()
        @registry_options
        def command(access: RegistryAccess | None) -> None:
            got.append(access)

        result = CliRunner(env=env).invoke(command, arguments, auto_envvar_prefix="X")
        if isinstance(result.exception, ConfigError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return got[0]

    return parse


def test_nothing_special(parse: Callable[..., RegistryAccess | None]) -> None:
    assert parse() is None
    assert parse("--plain-http") == RegistryAccess(plain_http=True)


def test_everything(parse: Callable[..., RegistryAccess | None], tmp_path: Path) -> None:
    for name in ("one.pem", "two.pem", "auth.json"):
        (tmp_path / name).touch()
    one, two, auth = (str(tmp_path / name) for name in ("one.pem", "two.pem", "auth.json"))
    access = parse(
        *("--mirror", "https://m.example/hub", "--mirror", "http://n.example:5000"),
        *("--ca-file", one, "--ca-file", two, "--auth-file", auth, "--skip-verify"),
        *("--proxy", "p.example:3128", "--proxy-fallback"),
    )
    assert access == RegistryAccess(
        mirrors=(Mirror(url="https://m.example/hub"), Mirror(url="http://n.example:5000")),
        http=HttpOptions(
            ca_files=(Path(one), Path(two)),
            skip_verify=True,
            proxy=ProxyOptions(url="http://p.example:3128", fallback=True),
        ),
        auth_file=Path(auth),
    )


def test_the_environment_is_spelled_like_the_options(parse: Callable[..., RegistryAccess | None]) -> None:
    access = parse(env={"X_MIRROR": "https://m.example https://n.example", "X_PROXY": "http://p.example"})
    assert access is not None
    assert [mirror.url for mirror in access.mirrors] == ["https://m.example", "https://n.example"]
    assert access.http.proxy == ProxyOptions(url="http://p.example", fallback=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--proxy", "http://me:hunter2@p.example"),
        ("--proxy", "http://p.example/hunter2"),
        ("--proxy", "socks5://me:hunter2@p.example"),
        ("--mirror", "https://me:hunter2@m.example"),
    ],
)
def test_passwords_have_no_place_on_the_command_line(
    parse: Callable[..., RegistryAccess | None], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as e:
        parse(*arguments)
    assert "hunter2" not in str(e.value)
    assert e.value.remedy
