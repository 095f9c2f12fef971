"""Memory that was freed goes back to the system.

glibc keeps freed pieces of up to 32 MB for later; block after block of tensors of other sizes leaves holes that none
fits in, and the process grows by a few dozen MB a block.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Does nothing where the C library is another one."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl
        return None
