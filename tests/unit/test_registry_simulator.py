"""The simulator as a process of its own, driven over HTTP: what tests of a daemon rely on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.image.resolve import resolve_image

ROOT = Path(__file__).parents[2]


def call(url: str, method: str = "GET", body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=30) as reply:
        return json.load(reply)


def test_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))  # whoever runs the tests may be logged in somewhere
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("content")
    build_image(tmp_path / "source", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sim.registry", "--build", tmp_path / "out", "--ref", "a/b:1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        control = f"{ready['url']}/_sim"
        call(f"{control}/faults", "POST", {"name": "server-error", "where": "manifest", "times": 1})
        image = asyncio.run(resolve_image(ready["image"], cache_dir=None, blob_dir=None, plain_http=True))
        assert image.bootstrap == (tmp_path / "out" / "image.boot").read_bytes()
        assert image.manifest_digest == ready["manifest"]
        assert [r["status"] for r in call(f"{control}/log")] == [503, 200, 206]
        assert call(f"{control}/faults")[0]["hits"] == 1
        call(f"{control}/log", "DELETE")
        assert call(f"{control}/log") == []
        with pytest.raises(urllib.error.HTTPError):
            call(f"{control}/nonsense", "POST", {})
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
