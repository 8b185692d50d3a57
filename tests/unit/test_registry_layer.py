"""The bootstrap layer: our own archives, those of other tools, and damaged ones."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.image.layer import decompress, extract_layer, pack_layer

BOOT = b"boot" * 1000 + b"!"
METAS = {"ab" * 32: b"m" * 4096, "00" * 32: b""}


def tar_of(*members: tuple[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_there_and_back() -> None:
    files = extract_layer(pack_layer(BOOT, METAS))
    assert files.bootstrap == BOOT
    assert files.blob_metas == METAS


def test_packing_is_deterministic_and_an_ordinary_tar() -> None:
    packed = pack_layer(BOOT, METAS)
    assert packed == pack_layer(BOOT, dict(reversed(METAS.items())))
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = tar.getmembers()
        assert [(m.name, m.mode, m.isdir()) for m in members] == [
            ("image", 0o755, True),
            ("image/image.boot", 0o444, False),
            (f"image/{'00' * 32}.blob.meta", 0o444, False),
            (f"image/{'ab' * 32}.blob.meta", 0o444, False),
        ]
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in members)
        content = tar.extractfile("image/image.boot")
        assert content is not None
        assert content.read() == BOOT


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["image/image.boot", "./image/image.boot", "image.boot"])
def test_archives_of_other_tools(kind: int, name: str) -> None:
    assert extract_layer(tar_of(("other", b"x" * 700), (name, BOOT), kind=kind)).bootstrap == BOOT


def test_the_new_place_wins_over_the_legacy_one() -> None:
    assert extract_layer(tar_of(("image/image.boot", BOOT), ("image.boot", b"old"))).bootstrap == BOOT


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_other_files_are_skipped(kind: int) -> None:
    long = "d/" * 90 + "image.boot"
    assert extract_layer(tar_of((long, b"x"), ("image/image.boot", BOOT), kind=kind)).bootstrap == BOOT


def test_extended_headers_name_and_size() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("wrong")
        info.size = len(BOOT)
        info.pax_headers = {"path": "image/image.boot", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(BOOT))
    assert extract_layer(out.getvalue()).bootstrap == BOOT


@pytest.mark.parametrize(
    "name", ["../image/image.boot", "/image/image.boot", "image/../image.boot", "IMAGE.BOOT"]
)
def test_other_names_are_no_bootstrap(name: str) -> None:
    with pytest.raises(BadImage, match=r"image/image\.boot"):
        extract_layer(tar_of((name, BOOT)))


def test_a_link_is_no_bootstrap() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("image/image.boot")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(BadImage):
        extract_layer(out.getvalue())


@pytest.mark.parametrize("data", [b"", bytes(1024), b"x" * 512, b"x" * 100])
def test_what_is_no_tar(data: bytes) -> None:
    with pytest.raises(BadImage):
        extract_layer(data)


def test_every_cut_is_noticed() -> None:
    packed = pack_layer(BOOT, {})
    end = len(packed) - 1024 - (-len(BOOT) % 512)
    for size in range(0, end, 97):
        with pytest.raises(BadImage):
            extract_layer(packed[:size])


@given(st.integers(0, 2047), st.integers(0, 7))
def test_a_flipped_bit_in_a_header_changes_nothing_or_is_an_error(at: int, bit: int) -> None:
    damaged = bytearray(pack_layer(b"z" * 512, {}))
    damaged[at % len(damaged)] ^= 1 << bit
    try:
        assert len(extract_layer(bytes(damaged)).bootstrap) == 512
    except BadImage:
        return


@given(st.binary(max_size=2048))
def test_any_bytes_give_a_layer_or_bad_image(data: bytes) -> None:
    try:
        extract_layer(data)
    except BadImage:
        return


def test_decompress() -> None:
    data = pack_layer(BOOT, METAS) * 300
    for packed in (
        data,
        gzip.compress(data),
        gzip.compress(data[:70_000]) + gzip.compress(data[70_000:]),
        gzip.compress(data) + bytes(700),
        zstandard.compress(data),
    ):
        assert decompress(io.BytesIO(packed)) == data
        with pytest.raises(BadImage, match="longer than"):
            decompress(io.BytesIO(packed), limit=len(data) - 1)
        assert decompress(io.BytesIO(packed), limit=len(data)) == data


def test_a_bomb_stops_at_the_limit() -> None:
    bomb = gzip.compress(bytes(1 << 28), 9)
    with pytest.raises(BadImage, match="longer than"):
        decompress(io.BytesIO(bomb), limit=1 << 20)


def test_many_members_are_not_copied_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0
    real = zlib.decompressobj

    class Counting:
        def __init__(self, wbits: int) -> None:
            self.inflater = real(wbits=wbits)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal copied
            out = self.inflater.decompress(data, limit)
            copied += len(self.inflater.unused_data)
            return out

        def __getattr__(self, name: str) -> object:
            return getattr(self.inflater, name)

    monkeypatch.setattr("virtiofsd_rafs.image.layer.zlib.decompressobj", Counting)
    members, data = 5000, tar_of(("image/image.boot", BOOT))
    packed = gzip.compress(b"", mtime=0) * members + gzip.compress(data)
    assert decompress(io.BytesIO(packed)) == data
    assert copied <= members << 14, "what follows a member is copied once per member: it has to be short"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_damaged_streams(pack: type) -> None:
    packed = bytearray(pack(BOOT * 50))
    for cut in (5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(BadImage):
            extract_layer(decompress(io.BytesIO(bytes(packed[:cut]))))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(BadImage):
        extract_layer(decompress(io.BytesIO(bytes(packed))))
