"""Memory that a CPU trainer frees and soon wants again."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**30
"""Bytes; larger blocks, such as whole models, still go back to the system when they are freed."""


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for its next use instead of giving it back to the system.

    A training step allocates and frees the same large tensors again and again. By default glibc takes each from the
    system and gives it back, and the system clears every page anew, which takes longer than the arithmetic of short
    layers. The process's peak stays what it is; below the peak it keeps more.

    Returns:
        Whether it was set: not where the C library is not glibc, which alone has these settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(setting, _LARGEST) == 1 for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
