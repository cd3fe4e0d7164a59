"""What is really in memory: arrays reachable from an object, and the peak of a piece of work."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def memory_of(array: np.ndarray | torch.Tensor) -> tuple[int, int]:
    """Return where the memory under an array or a view begins, and its bytes."""
    if isinstance(array, torch.Tensor):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.__array_interface__["data"][0], array.nbytes


def arrays_reachable_from(*roots: object) -> Iterator[np.ndarray | torch.Tensor]:
    """Yield every tensor and array that an object keeps, through all that it refers to."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, FunctionType, FrameType)):
            continue
        if isinstance(found, torch.nn.Module):  # the model's weights are not the cache's
            continue
        seen.add(id(found))
        if isinstance(found, (np.ndarray, torch.Tensor)):
            yield found
            continue
        waiting.extend(gc.get_referents(found))


def bytes_reachable_from(*roots: object, apart_from: tuple[object, ...] = ()) -> int:
    """Sum the memory under all arrays reachable, each counted once."""
    left_out = {memory_of(array)[0] for array in apart_from}
    blocks = dict(memory_of(array) for array in arrays_reachable_from(*roots))
    return sum(nbytes for start, nbytes in blocks.items() if start not in left_out)


class _Meter(TorchDispatchMode):
    """Counts the memory of tensors made while it is active, and lets go of what is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def _free(self, nbytes: int) -> None:
        self.held -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage() for t in tree_iter((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is None or storage in given or storage in self._known:
                continue
            self._known.add(storage)
            self.held += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out


def peak_of_tensors(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors that some work made and held at one time.

    What a library takes inside one operation is not seen.
    """
    with _Meter() as meter:
        work()
    return meter.peak
