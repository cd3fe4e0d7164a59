"""What lies in the middle of a layer's keys and values, taken off before they are coded.

Keys of one head, and values even more, share a large part with all the others. A constant that
is taken off costs nothing and leaves less to round: a query meets it once for all coded tokens,
and the weights of attention sum to one, so that it is added to what comes out as it is.

References
----------
SageAttention, https://arxiv.org/abs/2410.02367, section 4.2: the mean over tokens is taken off keys
before they are rounded.

Reproduced: for keys.
Deviates: for values too; the mean is that of the first tokens stored, and stays; a mean that says
little is taken for less (C. Stein, Inadmissibility of the usual estimator, 1956).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import RecordLayout

_SAMPLE_TOKENS = 1024
_ALIKE_TOKENS = 64  # neighbours are alike: so many say as much as one that is drawn by chance


class Centres:
    """The centres of all layers; each is settled by the first tokens that a layer stores.

    Parameters
    ----------
    layout : RecordLayout
        Raw records have no centre.
    """

    def __init__(self, layout: RecordLayout) -> None:
        self._table = torch.zeros(_shape(layout))
        self._is_settled = np.zeros(len(self._table), bool)

    @staticmethod
    def plan_bytes(layout: RecordLayout) -> int:
        """Return the bytes that the centres of a cache take."""
        shape = _shape(layout)
        return 4 * int(np.prod(shape)) + shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        return self._table.nbytes + self._is_settled.nbytes

    def of(self, layer_idx: int) -> Tensor | None:
        """Return a layer's: Tensor [2, num_kv_heads, head_dim], float32, of keys and of values.

        None where records are raw.
        """
        return self._table[layer_idx] if len(self._table) else None

    def settle(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Take the centre from tokens [num_kv_heads, num_tokens, head_dim], if there is none."""
        if not len(self._table) or self._is_settled[layer_idx]:
            return
        for half, tokens in enumerate((keys, values)):
            sample = tokens[:, :: max(1, tokens.shape[1] // _SAMPLE_TOKENS)]
            self._table[layer_idx, half] = _middle(sample.float()).cpu()
        self._is_settled[layer_idx] = True

    def forget(self) -> None:
        """Let every layer settle anew; only where no record is left that was coded."""
        self._table.zero_()
        self._is_settled[:] = False

    def state(self) -> dict[str, np.ndarray]:
        """Return them as plain arrays, for a kept store; none where records are raw."""
        if not len(self._table):
            return {}
        return {"table": self._table.numpy(), "is_settled": self._is_settled}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on with the arrays of `state`.

        Raises
        ------
        KeyError
            If one is missing.
        """
        if len(self._table):
            self._table.copy_(torch.from_numpy(state["table"]))
            self._is_settled[:] = state["is_settled"]


def _middle(tokens: Tensor) -> Tensor:
    """Return the mean of tokens [head, token, element], as far as it is not there by chance.

    Few tokens, or a stray one among them, say little of those to come: a mean is taken for less
    where its own variance is a good part of its square, as C. Stein does.
    """
    count = tokens.shape[1]
    if count < 2:
        return torch.zeros_like(tokens[:, 0])
    spread, mean = torch.var_mean(tokens, 1)
    size = mean.square().sum(-1, keepdim=True)
    chance = spread.sum(-1, keepdim=True) * (_ALIKE_TOKENS / count)
    return mean * (size / (size + chance).clamp(min=1e-30))


def _shape(layout: RecordLayout) -> tuple[int, int, int, int]:
    geometry = layout.geometry
    layers = 0 if layout.codec == "raw" else geometry.num_layers
    return layers, 2, geometry.num_kv_heads, geometry.head_dim
