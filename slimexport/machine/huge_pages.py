"""Memory of this process in pages of 2 MB, where Linux has them to give.

A model that is decoded reads all its weights for every token, and with pages of 4 kB the processor looks up a page for
every 4 kB of them. How much that costs depends on where the pages happen to lie, so that of several models in one
process the first one decoded up to an eighth slower, whichever it was (docs/speed.md). Where
`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise`, as in many distributions, memory gets them only for the
asking. A server asks for most of what it allocates by starting with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (glibc 2.35);
here all that is there already is asked for.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = 2 * 2**20
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h; the second from Linux 6.1 on, does it at once


def mode() -> str | None:
    """always, madvise or never; None where there is no such thing."""
    try:
        found = re.search(r"\[(\w+)\]", _ENABLED.read_text())
    except OSError:
        return None
    return found[1] if found else None


def ask() -> int:
    """Asks for huge pages for all that this process has allocated so far; returns how many bytes are in them."""
    if sys.platform != "linux" or mode() in (None, "never"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _regions():
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(start, end - start, advice)  # whatever it says: memory stays as it is then
    return held()


def held() -> int:
    """Bytes of this process' memory that are in huge pages."""
    try:
        found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _regions() -> Iterator[tuple[int, int]]:
    """Writable memory that is of no file, its whole huge pages."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if not access.startswith("rw-p") or inode != "0" or (name and name[0].startswith("[stack")):
            continue
        start, end = (int(word, 16) for word in addresses.split("-"))
        start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if end > start:
            yield start, end
