"""``--config`` and ``--blob-source``: what wins over what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from virtiofsd_rafs.backends.config import LocalBackend
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.config import IN_CONFIG_FILE, ServeConfig
from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENT = {
    "version": 2,
    "backend": {"type": "localfs", "localfs": {"dir": "/file"}},
    "cache": {"type": "filecache", "filecache": {"work_dir": "/file/cache"}},
    "rafs": {"batch_size": 65536, "prefetch": {"enable": False}, "misspelt": 1},
}


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ServeConfig]:
    """``configured(*options, **changes)``: what a daemon would be started with."""

    def run(*options: str, env: dict[str, str] | None = None, **changes: Any) -> ServeConfig:
        path = tmp_path / "nydusd.json"
        path.write_text(json.dumps(DOCUMENT | changes))
        seen: list[ServeConfig] = []
        monkeypatch.setattr("virtiofsd_rafs.runtime.serve.serve", lambda config: seen.append(config) or 0)
        arguments = ["serve", "x.boot", "--socket-path", "x.sock", "--config", str(path), *options]
        done = CliRunner().invoke(cli, arguments, auto_envvar_prefix="VIRTIOFSD_RAFS", env=env)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        assert "rafs.misspelt is no key of nydusd's: ignored" in done.output
        return seen[0]

    return run


def test_what_the_file_says_is_taken(configured: Callable[..., ServeConfig]) -> None:
    config = configured()
    assert config.blob_source == IN_CONFIG_FILE
    assert config.cache_dir == Path("/file/cache")
    assert config.amplify == 65536
    assert config.prefetch == "none"


def test_the_command_line_and_the_environment_win(
    configured: Callable[..., ServeConfig], tmp_path: Path
) -> None:
    env = {"VIRTIOFSD_RAFS_SERVE_AMPLIFY": "1MiB"}
    config = configured("--cache-dir", "/mine", "--prefetch", "table", env=env)
    assert config.cache_dir == Path("/mine")
    assert config.prefetch == "table"
    assert config.amplify == 1 << 20
    assert configured("--no-cache").cache_dir is None
    assert configured("--blob-source", "/mine").blob_source == LocalBackend(dirs=(Path("/mine"),))
    config = configured("--blob-dir", str(tmp_path))
    assert config.blob_source is None
    assert config.blob_dir == tmp_path


def test_a_cache_on_the_command_line_wins_over_none_in_the_file(
    configured: Callable[..., ServeConfig],
) -> None:
    assert configured(cache={"type": "dummycache"}).cache_dir is None
    assert configured("--cache-dir", "/mine", cache={"type": "dummycache"}).cache_dir == Path("/mine")


def test_two_places(configured: Callable[..., ServeConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two places"):
        configured("--blob-source", "/mine", "--blob-dir", str(tmp_path))
