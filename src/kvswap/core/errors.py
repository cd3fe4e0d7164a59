"""Every error raised on purpose, in one closed tree.

Each is also the built-in a caller would expect, so either can be caught.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class KVSwapError(Exception):
    """Root of every error that kvswap raises on purpose."""


class ConfigError(KVSwapError, ValueError):
    """A setting or an input that cannot be used.

    The message names the field, the law it breaks, and the value given.
    """


class BudgetError(ConfigError):
    """A memory budget below what the work needs.

    Attributes
    ----------
    have_bytes, need_bytes : int
        The budget given, and the smallest that would work.
    """

    def __init__(self, message: str, *, have_bytes: int, need_bytes: int) -> None:
        super().__init__(message)
        self.have_bytes = have_bytes
        self.need_bytes = need_bytes


class UnsupportedModelError(KVSwapError, TypeError):
    """A model whose attention kvswap cannot serve.

    Attributes
    ----------
    model_class : str
        Name of the model's class.
    missing : str
        What the model lacks.
    """

    def __init__(self, model_class: str, missing: str) -> None:
        super().__init__(f"{model_class} is not supported: {missing}")
        self.model_class = model_class
        self.missing = missing


class InvalidKeysError(KVSwapError, ValueError):
    """Keys or values of a token that are NaN or infinite.

    Nothing of its group has been stored or encoded in that layer, and what was stored before
    stands. After ``crop(token)`` the cache can go on without it.

    Attributes
    ----------
    what : str
        ``"keys"`` or ``"values"``.
    layer_idx : int
        The model's layer; among the layers on disk where no model is tied to the cache.
    token : int
        Its position in the sequence, padding included.
    row : int
        Which sequence of the batch.
    """

    def __init__(self, what: str, *, layer_idx: int, token: int, row: int) -> None:
        super().__init__(what, layer_idx, token, row)
        self.what, self.layer_idx = what, layer_idx
        self.token, self.row = token, row

    def __str__(self) -> str:
        return (
            f"{self.what} must be finite, got NaN or infinity in layer {self.layer_idx} at token"
            f" {self.token} (row {self.row} of the batch)"
        )


class KernelUnavailableError(KVSwapError, RuntimeError):
    """A kernel that was asked for by name and is not present here."""


class SessionClosedError(KVSwapError, RuntimeError):
    """A cache that was used after it was closed or detached."""


class StoreError(KVSwapError):
    """Root of what can go wrong with bytes on a device.

    Attributes
    ----------
    record_ids : tuple of int
        Records that the failed request was to move, where it was one of records.
    layer_idx : int or None
        Among the layers on disk; each head group of a layer counts as one.
    groups : tuple of int
        Whose records they are, where a cache asked for them.
    others : tuple of StoreError
        Those of other drives that the same request was for.
    """

    record_ids: tuple[int, ...] = ()
    layer_idx: int | None = None
    groups: tuple[int, ...] = ()
    others: tuple[StoreError, ...] = ()

    def __str__(self) -> str:
        if self.layer_idx is None:
            return super().__str__()
        some = ", ".join(map(str, self.groups[:8])) + (", ..." if len(self.groups) > 8 else "")
        return f"{super().__str__()} (layer {self.layer_idx}, groups {some})"


class DeviceIOError(StoreError, OSError):
    """A read or write that the device or the file system failed.

    Attributes
    ----------
    path : str
        File concerned.
    offset_bytes, nbytes : int
        Where, and how much was asked for.
    """

    def __init__(
        self,
        errno: int,
        path: str | Path,
        *,
        offset_bytes: int = 0,
        nbytes: int = 0,
        what: str = "",
    ) -> None:
        reason = what or os.strerror(errno)
        super().__init__(errno, f"{reason} ({nbytes} bytes at offset {offset_bytes})", str(path))
        self.path = str(path)
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes


class CorruptStoreError(StoreError, ValueError):
    """Stored bytes that are not what was written.

    Attributes
    ----------
    path : str
        File concerned.
    check : str
        Which check failed.
    expected, found : Any
        Both sides of it.
    """

    def __init__(self, path: str | Path, check: str, *, expected: Any, found: Any) -> None:
        super().__init__(f"{path}: {check}: expected {expected}, found {found}")
        self.path = str(path)
        self.check = check
        self.expected = expected
        self.found = found


class StoreFullError(StoreError, OSError):
    """A device, or the limit set on it, has no room for what must be stored.

    Attributes
    ----------
    need_bytes, have_bytes : int
        What was asked for, and what there is.
    limit : str
        What leaves no more.
    """

    def __init__(self, path: str | Path, *, need_bytes: int, have_bytes: int, limit: str) -> None:
        import errno

        message = f"no room for {need_bytes} bytes, {have_bytes} left ({limit})"
        super().__init__(errno.ENOSPC, message, str(path))
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.limit = limit


class StoreLockedError(StoreError, OSError):
    """A store that another process, or another cache of this one, has open."""

    def __init__(self, path: str | Path, holder: str) -> None:
        import errno

        super().__init__(errno.EBUSY, f"in use by {holder}", str(path))
        self.holder = holder
