"""The Python mirror of the FUSE ABI against the installed kernel header, and its round trips."""

from __future__ import annotations

import enum
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiofsd_rafs.fuse import build_dirent, build_request, consts, parse_dirents, parse_xattr_names, structs
from virtiofsd_rafs.fuse.structs import Attr, EntryOut, InHeader
from virtiofsd_rafs.fuse.wire import Wire

HEADER = Path("/usr/include/linux/fuse.h")

# Names that Debian 12's header (Linux 6.1) may lack, because a later kernel added them.
NEWER = {
    "FUSE_STATX",
    "FUSE_COPY_FILE_RANGE_64",
    "FUSE_CREATE_SUPP_GROUP",
    "FUSE_DIRECT_IO_ALLOW_MMAP",
    "FUSE_PASSTHROUGH",
    "FUSE_NO_EXPORT_SUPPORT",
    "FUSE_HAS_RESEND",
    "FUSE_ALLOW_IDMAP",
    "FUSE_OVER_IO_URING",
    "FUSE_REQUEST_TIMEOUT",
}
# Names that a later kernel gave to bytes that were padding in 7.38: `offsetof` must not ask for the old ones.
RENAMED = {("fuse_open_out", "padding"), ("fuse_init_out", "unused")}

STRUCTS: list[type[Wire]] = [
    cls
    for _, cls in inspect.getmembers(structs, inspect.isclass)
    if issubclass(cls, Wire) and cls is not Wire
]
PREFIXES = {
    consts.Opcode: "FUSE_",
    consts.Init: "FUSE_",
    consts.Fopen: "FOPEN_",
    consts.Fattr: "FATTR_",
    consts.AttrFlag: "FUSE_ATTR_",
    consts.GetattrFlag: "FUSE_GETATTR_",
}


def constants() -> dict[str, int]:
    names = {prefix + m.name: int(m.value) for cls, prefix in PREFIXES.items() for m in cls}
    return names | {
        "FUSE_KERNEL_VERSION": consts.KERNEL_VERSION,
        "FUSE_ROOT_ID": consts.ROOT_ID,
        "FUSE_MIN_READ_BUFFER": consts.MIN_READ_BUFFER,
    }


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says about the header: sizes, ``struct.field`` offsets and widths, constants."""
    words = set(re.findall(r"\w+", HEADER.read_text()))
    lines = []
    for cls in STRUCTS:
        c = f"struct {cls.C_NAME}"
        lines.append(f'P("{cls.C_NAME}", sizeof({c}));')
        for field in cls.OFFSETS:
            if (cls.C_NAME, field) not in RENAMED:
                lines.append(f'P("{cls.C_NAME}.{field}", offsetof({c}, {field}));')
                lines.append(f'P("{cls.C_NAME}.{field}:", sizeof((({c} *)0)->{field}));')
    lines += [f'P("{name}", {name});' for name in constants() if name in words]
    lines.append('P("minor", FUSE_KERNEL_MINOR_VERSION);')
    source = tmp_path_factory.mktemp("probe") / "probe.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
        '#define P(n, v) printf("%s %llu\\n", n, (unsigned long long)(v))\n'
        "int main(void) {" + "\n".join(lines) + "return 0; }\n"
    )
    binary = source.with_suffix("")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", binary, source], check=True)
    out = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in out.splitlines())}


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda c: c.C_NAME)
def test_layout_is_the_kernels(cls: type[Wire], probe: dict[str, int]) -> None:
    assert probe[cls.C_NAME] == cls.SIZE
    ours = {field: place for field, place in cls.OFFSETS.items() if (cls.C_NAME, field) not in RENAMED}
    theirs = {f: (probe[f"{cls.C_NAME}.{f}"], probe[f"{cls.C_NAME}.{f}:"]) for f in ours}
    assert ours == theirs


def test_numbers_are_the_kernels(probe: dict[str, int]) -> None:
    assert probe["minor"] >= consts.KERNEL_MINOR_VERSION
    ours = constants()
    missing = {name for name in ours if name not in probe}
    assert missing <= NEWER
    assert {n: v for n, v in ours.items() if n in probe} == {n: probe[n] for n in ours if n in probe}


def test_no_number_stands_for_two_things() -> None:
    for cls in PREFIXES:
        assert issubclass(cls, enum.IntEnum | enum.IntFlag)
        assert len(set(cls.__members__.values())) == len(cls.__members__)


def values(cls: type[Wire]) -> st.SearchStrategy[Any]:
    """Arbitrary instances of a structure."""
    fields: list[st.SearchStrategy[Any]] = []
    for (name, nested), (_, width) in zip(cls._NESTED, cls.OFFSETS.values(), strict=True):
        default = getattr(cls(), name)
        if nested is not None:
            fields.append(values(nested))
        elif isinstance(default, bytes):
            fields.append(st.binary(min_size=width, max_size=width))
        else:
            signed = (cls.C_NAME, name) == ("fuse_out_header", "error")
            top = 1 << (width * 8)
            fields.append(st.integers(-top // 2, top // 2 - 1) if signed else st.integers(0, top - 1))
    return st.tuples(*fields).map(lambda parts: cls(*parts))


@given(st.data())
def test_structures_survive_the_wire(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(STRUCTS))
    value = data.draw(values(cls))
    packed = value.pack()
    assert len(packed) == cls.SIZE
    assert cls.unpack(b"xyz" + packed + b"tail", 3) == value
    with pytest.raises(ValueError, match=cls.C_NAME):
        cls.unpack(packed, 1)


def test_requests_begin_with_their_header() -> None:
    request = build_request(consts.Opcode.LOOKUP, 7, b"name\0", unique=99)
    assert InHeader.unpack(request) == InHeader(len=45, opcode=1, unique=99, nodeid=7, pid=1)
    assert request[40:] == b"name\0"
    assert InHeader.unpack(build_request(1, 1, unique=1, len_=3)).len == 3


NAMES = st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n)


@given(st.lists(st.tuples(NAMES, st.integers(0, 2**64 - 1), st.integers(0, 15))), st.booleans())
def test_directory_entries_survive_the_wire(entries: list[tuple[bytes, int, int]], plus: bool) -> None:
    entry = EntryOut(nodeid=5, attr=Attr(ino=5, mode=0o100644)) if plus else None
    data = b"".join(build_dirent(ino, ino, t, name, entry) for name, ino, t in entries)
    parsed = list(parse_dirents(data, plus=plus))
    assert [(e.name, e.ino, e.type) for e in parsed] == entries
    assert all(e.entry == entry for e in parsed)


@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_directory_data_is_parsed_or_refused(data: bytes, plus: bool) -> None:
    try:
        entries = list(parse_dirents(data, plus=plus))
    except ValueError:
        return
    rebuilt = sum(len(build_dirent(e.ino, e.off, e.type, e.name, e.entry)) for e in entries)
    assert rebuilt == len(data)


@pytest.mark.parametrize(("data", "names"), [(b"", []), (b"user.a\0user.b\0", [b"user.a", b"user.b"])])
def test_xattr_names(data: bytes, names: list[bytes]) -> None:
    assert parse_xattr_names(data) == names


@pytest.mark.parametrize("data", [b"user.a", b"\0", b"a\0\0b\0"])
def test_malformed_xattr_names(data: bytes) -> None:
    with pytest.raises(ValueError, match="malformed"):
        parse_xattr_names(data)
