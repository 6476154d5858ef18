"""The C library's heap, set for training: it keeps what is freed, since the next step asks for the same again."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of mallopt(3)


def keep_freed_memory() -> None:
    """Have glibc's malloc hand nothing back to the system and take nothing by mmap up to 32 MiB, its limit.

    As it comes, it maps large tensors anew every step, and the system clears every page of them: a tenth of a small
    model's step on CPU. Elsewhere than on Linux with glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_TOP_PAD, 16 << 20)
