"""Memory that was freed goes back to the system.

glibc keeps freed pieces of up to 32 MB for later; block after block of tensors of other sizes leaves holes that none
fits in, and the process grows by a few dozen MB a block.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

APART = 4 * 2**20
_M_MMAP_THRESHOLD = -3  # malloc.h


def give_back() -> None:
    """Does nothing where the C library is another one."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_apart() -> None:
    """From here on pieces of 4 MB and more come from the system one by one, and go back as soon as they are freed. That
    costs a page fault for every 4 kB of each: little beside what is computed with matrices of a large model, and a
    tenth of the time of a small one."""
    found = _function("mallopt")
    if found is not None:
        found(_M_MMAP_THRESHOLD, APART)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        made: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl
        return None
    return made
