"""What a guest has read, as a list that prefetch takes: the files in the order of first use, and which parts.

The order comes from the log of fetches, so it is complete for a guest that started with an empty cache; what
was read from the cache alone stands at the end. For a thread, as prefetch is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from virtiofsd_rafs.native.rafs import RUN_WORDS, NativeTree
from virtiofsd_rafs.native.store import raw_paths
from virtiofsd_rafs.runtime.prefetch import NID_BIAS, Listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from mmap import mmap

    from virtiofsd_rafs.runtime.layout import Key
    from virtiofsd_rafs.runtime.metrics import FetchRecord

# After so many runs of chunks the other threads get their turn.
_BATCH = 500
_TURN_S = 0.0005


def order_of_use(log: Iterable[FetchRecord], touched: Mapping[int, bytes]) -> dict[Key, None]:
    """The chunks that were read, in the order in which they were fetched; *touched* per blob, a byte each."""
    order: dict[Key, None] = {}
    for record in sorted(log, key=lambda record: record.started_ns):
        blob = record.blob_index
        read = touched.get(blob, b"")
        for chunk, reason in record.chunks:
            if reason == "demand" or (chunk < len(read) and read[chunk]):
                order[blob, chunk] = None
    for blob, read in sorted(touched.items()):
        chunk = -1
        # What was read and is not in the log: few, or all of a warm start.
        while (chunk := _next_read(read, chunk + 1)) >= 0:
            order.setdefault((blob, chunk), None)
    return order


def _next_read(read: bytes, start: int) -> int:
    found = [at for value in (1, 2) if (at := read.find(value, start)) >= 0]
    return min(found, default=-1)


def accessed(image: bytes | mmap, order: Mapping[Key, None]) -> list[Listed]:
    """The files behind the chunks *order* of the bootstrap *image*, in that order. Raises BadImage.

    Neighbouring parts of a file that were used one after the other are one entry; a file that was used as a
    whole is named without a place.
    """
    tree = NativeTree(image)
    stride = tree.superblock.chunk_size
    place: dict[Key, tuple[int, int]] = {}
    words = tree.run_words(tree.root)
    for number, at in enumerate(range(0, len(words), RUN_WORDS)):
        if number % _BATCH == 0:
            time.sleep(_TURN_S)
        nid, offset, blob, first, n = words[at : at + RUN_WORDS]
        for i in range(n):
            if (blob, first + i) in order:
                place.setdefault((blob, first + i), (nid, offset + i * stride))
    parts: list[list[int]] = []  # nid, offset, length
    for key in order:
        if key in place:
            nid, offset = place[key]
            if parts and parts[-1][0] == nid and sum(parts[-1][1:]) == offset:
                parts[-1][2] += stride
            else:
                parts.append([nid, offset, stride])
    nids = list({nid for nid, _, _ in parts})
    names = raw_paths(image, [nid + NID_BIAS for nid in nids])
    sizes = {nid: tree.inode(nid).size for nid in nids}
    entries = []
    for nid, offset, length in parts:
        path = names.get(nid + NID_BIAS)
        if path:
            whole = offset == 0 and length >= sizes[nid]
            entries.append(Listed(path) if whole else Listed(path, offset, min(length, sizes[nid] - offset)))
    return entries
