"""The native module, where it was built and is not switched off.

``KVSWAP_NATIVE=0`` hides it. Without it everything still works, slower: plain torch takes the
place of its kernels, Python and a pool of threads that of its I/O engine.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType


def _find() -> ModuleType | None:
    if os.environ.get("KVSWAP_NATIVE", "1") == "0":
        return None
    try:
        return import_module("kvswap._native")
    except ImportError:  # not built for this platform, or a source tree without `make native`
        return None


native = _find()


@cache
def warn_once(message: str) -> None:
    """Warn, but never twice of the same."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
