"""What tests of back-ends share: the configuration that a source reads, a clock, nobody's credentials."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.backends.config import RegistryAccess

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    import pytest


@attrs.frozen
class Config:
    """The part of the daemon's configuration that a source reads."""

    access: RegistryAccess = attrs.field(factory=RegistryAccess)
    connections: int = 8
    io_deadline_s: float = 90.0


class Clock:
    """Stands in for the module ``time`` in one module; stops until a test moves ``now``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    @classmethod
    def of(cls, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Clock:
        """The clock that *module* sees from now on."""
        clock = cls()
        monkeypatch.setattr(module, "time", clock)
        return clock


def nobody(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Whoever runs the tests may be logged in somewhere; that must not matter.

    Returns the config.json of docker that is looked into, which is not there yet.
    """
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(folder / "auth.json"))
    return folder / "config.json"
