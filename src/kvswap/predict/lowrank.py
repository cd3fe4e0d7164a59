"""Low-rank key index: post-RoPE keys of all KV heads, projected together.

Paper: KVSwap, https://arxiv.org/abs/2511.11907, grouped prediction from compact keys.

Reproduced: one projection a layer over the joined KV heads, from an uncentred decomposition
of post-RoPE keys; a score a token; a group scores as its best token does.
Deviates: query heads are not averaged before the dot product, each scores alone and the best
counts; coefficients may be stored in 8, 4, 2 or 1 bits after a rotation within the rank, or as
principal components of centred keys in bands of 8, 4 and 2 bits, which says more where bytes are
few; the projection is fitted to the prompt itself where none was calibrated.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.core.units import align_up
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.banded import BandCode
from kvswap.kernels.codes import CODES
from kvswap.kernels.native import DTYPE_CODES, native, query_view
from kvswap.kernels.scores import group_maximum, reduce_heads
from kvswap.kernels.tiles import TILE_TOKENS, put_codes, take_codes, tiled_zeros
from kvswap.predict.base import KeyIndex, register_index
from kvswap.predict.components import KeyMoments
from kvswap.predict.projection import fit_workspace_bytes, leading_basis, leading_components

if TYPE_CHECKING:
    from kvswap.kernels.gpu.index import DeviceScanner

_LEAST_BLOCK_TOKENS = 512  # scored at once; more where fitting takes the memory anyway
_FEW_GROUPS = 16  # encoded one by one: for more a matrix product is faster
# As csrc/kernels/api.h numbers them.
_NATIVE_CODES = {"rot4": 0, "int8": 1, "bf16": 2, "rot2": 3, "rot1": 4, "band": 5}
ANY_BASIS_CODES = ("rot4", "int8", "bf16", "rot2", "rot1")
"""Codes that go with whatever projection there is."""
_PLENTY = 64  # of a rank: no code of a token is that of fewer bytes and says as much
_WIDE_TOKENS = 64  # tokens held in float32 at once while fitting and encoding


@register_index("lowrank")
class LowRankIndex(KeyIndex):
    """One layer's low-rank index; see `KeyIndex` and the module's head.

    Attributes
    ----------
    has_query_basis : bool
        Whether queries are projected otherwise than keys are.
    """

    codes: ClassVar[tuple[str, ...]] = (*ANY_BASIS_CODES, "band")
    has_query_basis: ClassVar[bool] = False
    takes_basis = True
    serves_device = True

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry = geometry
        self._group_size = group_size
        self._code = CODES[code](rank)
        num_tokens = num_groups * group_size
        self._tiles = tiled_zeros(num_tokens, self._code.width)
        room = len(self._tiles) * TILE_TOKENS
        self._scales = torch.zeros(room, dtype=torch.float16) if self._code.has_scale else None
        self._most = most = _most_coefficients(geometry, rank, code)
        self._basis_room = torch.zeros(geometry.key_dim * most, dtype=torch.bfloat16)
        self._basis = self._basis_room.view(-1, most)
        own = self.has_query_basis
        self._query_basis = torch.zeros_like(self._basis) if own else self._basis
        # Of the banded code: the mean key, and what it is in coefficients.
        is_centred = self._code.needs_fit
        self._mean = torch.zeros(geometry.key_dim) if is_centred else None
        self._offsets = torch.zeros(most) if is_centred else None
        self._steps_room = torch.zeros(most if is_centred else 0)
        if isinstance(self._code, BandCode):
            self._hold_steps(self._code)
        self._covariance: Tensor | None = None
        self._key_moments: KeyMoments | None = None
        self._is_fitted = False
        tokens = _block_tokens(geometry, rank, code, num_groups, group_size)
        self._block_groups = max(1, tokens // group_size)
        self._num_groups = num_groups
        self._scanner = self._make_scanner()
        self._device_scanner: DeviceScanner | None = None

    def _make_scanner(self, *, is_joined: bool = False) -> Any:
        """Return what scores natively; joined it takes the keys of all KV heads for one's."""
        module, code, geometry = native(), self._code, self._geometry
        banded = code if isinstance(code, BandCode) else None
        return module and module.Scanner(
            code=_NATIVE_CODES[code.name],
            codes=self._tiles.data_ptr(),
            scales=0 if self._scales is None else self._scales.data_ptr(),
            basis=self._basis.data_ptr(),
            query_basis=self._query_basis.data_ptr(),
            offsets=0 if self._offsets is None else self._offsets.data_ptr(),
            steps=banded.steps.data_ptr() if banded else 0,
            counts=banded.counts if banded else (0, 0, 0),
            width=code.width,
            rank=code.num_coefficients,
            group_size=self._group_size,
            num_groups=self._num_groups,
            num_kv_heads=1 if is_joined else geometry.num_kv_heads,
            head_dim=geometry.key_dim if is_joined else geometry.head_dim,
        )

    def move(self, accelerator: Accelerator) -> None:
        """Move codes, scales and projection to a device; see `KeyIndex.move`."""
        from kvswap.kernels.gpu.index import DeviceScanner

        self.device = accelerator.device
        self._tiles, self._basis = self._tiles.to(self.device), self._basis.to(self.device)
        own = self.has_query_basis
        self._query_basis = self._query_basis.to(self.device) if own else self._basis
        self._scales = None if self._scales is None else self._scales.to(self.device)
        self._scanner = None
        self._device_scanner = DeviceScanner(self._code, self._group_size, accelerator)

    @classmethod
    def takes_basis_with(cls, code: str) -> bool:
        """Whether `set_basis` can take the place of a fit: of codes that need no more."""
        return cls.takes_basis and not CODES[code].needs_fit

    @classmethod
    def serves_device_with(cls, code: str) -> bool:
        """Whether it can lie on an accelerator: the banded code is scored on the host."""
        return cls.serves_device and not CODES[code].needs_fit

    @classmethod
    def default_code(cls, rank: int, *, takes_basis: bool = False, on_device: bool = False) -> str:
        """Four bits after a rotation; below a rank of 64, where it can be, the banded code."""
        is_banded = rank < _PLENTY and not takes_basis and not on_device
        return BandCode.name if is_banded and BandCode.name in cls.codes else cls.codes[0]

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Codes of every group, projections in bfloat16; of the banded code mean and steps."""
        tokens = align_up(num_groups * group_size, TILE_TOKENS)
        most = _most_coefficients(geometry, rank, code)
        bases = (1 + cls.has_query_basis) * geometry.key_dim * most * 2
        mean = 4 * (geometry.key_dim + 2 * most) * CODES[code].needs_fit
        return tokens * CODES[code](rank).token_bytes + bases + mean

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take the larger of a fit and of scoring a block of tokens and all groups."""
        tokens = _block_tokens(geometry, rank, code, num_groups, group_size)
        block = min(tokens, num_groups * group_size) * _token_scratch_bytes(geometry, rank, code)
        score = block + num_groups * _group_scratch_bytes(geometry)
        return max(_fit_bytes(geometry, rank, code), score)

    @property
    def nbytes(self) -> int:
        """Codes, scales, projections and mean."""
        bases = (1 + self.has_query_basis) * self._basis_room.nbytes
        rest = (self._scales, self._mean, self._offsets, self._steps_room)
        return self._tiles.nbytes + bases + sum(held.nbytes for held in rest if held is not None)

    @property
    def is_fitted(self) -> bool:
        """Whether there is a projection."""
        return self._is_fitted

    @property
    def basis(self) -> Tensor:
        """The projection of keys, [num_kv_heads * head_dim, rank], bfloat16."""
        return self._basis

    def observe(self, keys: Tensor) -> None:
        """Add keys to the uncentred covariance, or of the banded code to their moments."""
        if self._code.needs_fit:
            if self._key_moments is None and len(keys):
                self._key_moments = KeyMoments(keys[0])
            if self._key_moments is not None:
                for block in keys.split(_WIDE_TOKENS):
                    self._key_moments.add(block)
            return
        if self._covariance is None:
            self._covariance = torch.zeros(keys.shape[1], keys.shape[1], device=self.device)
        for block in keys.split(_WIDE_TOKENS):
            wide = block.float()
            self._covariance.addmm_(wide.t(), wide)

    def forget_keys(self) -> None:
        """Forget the sums over keys."""
        self._covariance = self._key_moments = None

    @property
    def looks_twice(self) -> bool:
        """Whether keys are weighed: by the banded code; see `KeyMoments`."""
        return self._code.needs_fit

    def observe_again(self, keys: Tensor) -> None:
        """Weigh keys by how unusual they are."""
        if self._key_moments is not None:
            for block in keys.split(_WIDE_TOKENS):
                self._key_moments.add_again(block)

    def fit(self) -> None:
        """Take the leading eigenvectors and rotate them among themselves, or scale them."""
        if self._covariance is None and self._key_moments is None:
            raise ConfigError("fit needs observed keys, got none")
        if self._key_moments is not None:
            self._fit_components(*self._key_moments.take())
            return
        assert self._covariance is not None
        bases = self._find_bases(self._covariance.cpu())
        self._covariance = None
        self._use(*bases)

    def _fit_components(self, mean: Tensor, covariance: Tensor) -> None:
        assert self._mean is not None
        assert self._offsets is not None
        self._key_moments = None
        vectors, variances = leading_components(covariance, self._most)
        code = BandCode.fitted(self._code.rank, variances)
        basis = vectors[:, : code.num_coefficients].to(self._basis.dtype)
        self._mean.copy_(mean)
        self._offsets[: basis.shape[1]] = mean @ basis.float()
        self._take_code(code)
        self._use(basis, basis)

    def _take_code(self, code: BandCode) -> None:
        """Use a code as it was fitted; its coefficients lie where there is room for the most."""
        room = self._basis_room[: self._geometry.key_dim * code.num_coefficients]
        self._basis = self._query_basis = room.view(-1, code.num_coefficients)
        self._code = self._hold_steps(code)
        if self._scanner is not None:
            self._scanner = self._make_scanner()

    def _hold_steps(self, code: BandCode) -> BandCode:
        """Put a code's steps where there is room for the most."""
        room = self._steps_room[: code.num_coefficients]
        code.steps = room.copy_(code.steps)
        return code

    def _find_bases(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projections of keys and of queries; the covariance may be changed."""
        basis = leading_basis(covariance, self._code.rank)
        return basis, basis

    def set_basis(self, basis: Tensor) -> None:
        """Use a projection made elsewhere, [num_kv_heads * head_dim, rank]."""
        if not self.takes_basis_with(self._code.name):
            raise ConfigError(
                f"projection must be left out with the {self._code.name} code, whose grids are"
                " fitted to keys"
            )
        if basis.shape != self._basis.shape:
            expected = list(self._basis.shape)
            raise ConfigError(f"projection must be {expected}, got {list(basis.shape)}")
        self._use(basis, basis)

    def _use(self, basis: Tensor, query_basis: Tensor) -> None:
        self._basis.copy_(basis)
        if self.has_query_basis:
            self._query_basis.copy_(query_basis)
        self._is_fitted = True

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Project, code and keep; see `KeyIndex.encode`."""
        if self._scanner is not None and len(groups) <= _FEW_GROUPS and keys.dtype in DTYPE_CODES:
            keys = keys.contiguous()
            self._scanner.encode(keys.data_ptr(), DTYPE_CODES[keys.dtype], groups)
            return
        basis = self._basis.float()
        step = max(1, _WIDE_TOKENS // self._group_size)
        for first in range(0, len(groups), step):
            ids = groups[first : first + step]
            begin = first * self._group_size
            wide = keys[begin : begin + len(ids) * self._group_size].float()
            coefficients = wide @ basis
            if self._offsets is not None:
                coefficients -= self._offsets[: basis.shape[1]]
            codes, scales = self._code.encode(coefficients)
            tokens = self._tokens_of(ids)
            put_codes(self._tiles, tokens, codes)
            if self._scales is not None and scales is not None:
                self._scales[tokens] = scales

    def _tokens_of(self, groups: np.ndarray) -> Tensor:
        tokens = groups[:, None] * self._group_size + np.arange(self._group_size)
        return torch.from_numpy(tokens.reshape(-1))

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score each query head against every token; see `KeyIndex.score_heads`."""
        scores = self._score_groups((self._project(query) * scaling).flatten(0, 1), groups)
        if self._mean is not None:  # a constant a head, which matters here alone
            means = self._mean.unflatten(0, (self._geometry.num_kv_heads, -1))
            by_kv_head = query[:, 0].float().unflatten(0, (len(means), -1))
            scores += (by_kv_head @ means[:, :, None]).flatten() * scaling
        return scores

    def score_averaged(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score the mean of the heads' dot products, token by token; see `KeyIndex`.

        Products are linear, so that the mean of all heads is one query of the joined keys.
        """
        if self._device_scanner is not None:
            return super().score_averaged(query, groups, scaling=scaling)
        kv_heads = self._geometry.num_kv_heads
        by_kv_head = query.float().unflatten(0, (kv_heads, -1)).mean(1) / kv_heads
        joined = by_kv_head.transpose(0, 1).flatten(1)  # [q_len, key_dim]
        scanner = None if self._scanner is None else self._make_scanner(is_joined=True)
        best: Tensor | None = None
        for token in joined.split(1):
            if scanner is not None:
                scores = self._scan(scanner, token[None], groups, scaling, len(groups))
            else:
                carried = token @ self._query_basis.float() * scaling
                scores = self._score_groups(carried, groups)[:, 0]
            scores = scores - torch.logsumexp(scores, 0)
            best = scores if best is None else torch.maximum(best, scores)
        assert best is not None, "there is a query"
        return best

    def score(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: int | None = None
    ) -> Tensor:
        """Score each query head against every token; see `KeyIndex.score`."""
        if self._scanner is None or query.dtype not in DTYPE_CODES:
            return self._score_plainly(query, groups, scaling, wanted)
        if query.stride(2) != 1:
            query = query.contiguous()
        most = len(groups) if wanted is None else wanted
        return self._scan(self._scanner, query, groups, scaling, most)

    def _scan(
        self, scanner: Any, query: Tensor, groups: np.ndarray, scaling: float, wanted: int
    ) -> Tensor:
        address, heads, q_len, head_stride, token_stride = query_view(query)
        scores = torch.empty(len(groups), dtype=torch.float32)
        scanner.scan(
            address,
            DTYPE_CODES[query.dtype],
            heads,
            q_len,
            head_stride,
            token_stride,
            scaling,
            groups,
            wanted,
            scores.data_ptr(),
        )
        return scores

    def _score_plainly(
        self, query: Tensor, groups: np.ndarray, scaling: float, wanted: int | None = None
    ) -> Tensor:
        by_token = (
            self._reduce_heads(self._score_groups(token, groups), wanted)
            for token in self._project(query) * scaling
        )
        return functools.reduce(torch.maximum, by_token)

    def _reduce_heads(self, scores: Tensor, wanted: int | None) -> Tensor:
        return reduce_heads(scores, wanted)

    def _project(self, query: Tensor) -> Tensor:
        """Carry each query head through its KV head's slice: [q_len, num_heads, rank]."""
        kv_heads = self._geometry.num_kv_heads
        slices = self._query_basis.float().unflatten(0, (kv_heads, -1))
        by_kv_head = query.float().unflatten(0, (kv_heads, -1)).flatten(1, 2)
        projected = torch.bmm(by_kv_head, slices)
        return projected.unflatten(1, (-1, query.shape[1])).flatten(0, 1).transpose(0, 1)

    def _score_groups(self, queries: Tensor, groups: np.ndarray) -> Tensor:
        if self._device_scanner is not None:
            return self._device_scanner.scan(queries, self._tiles, self._scales, groups)
        scored = []
        for first in range(0, len(groups), self._block_groups):
            tokens = self._tokens_of(groups[first : first + self._block_groups])
            scales = None if self._scales is None else self._scales[tokens]
            products = self._code.score(queries, take_codes(self._tiles, tokens), scales)
            scored.append(group_maximum(products, self._group_size))
        return torch.cat(scored) if len(scored) > 1 else scored[0]

    def state(self) -> dict[str, np.ndarray]:
        """Return projections, codes and scales as plain arrays."""
        if not self._is_fitted:
            return {}
        arrays = {name: _plain(held).cpu().numpy() for name, held in self._kept().items()}
        if isinstance(self._code, BandCode):
            arrays["counts"] = np.array(self._code.counts, np.int64)
        return arrays

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if not state:
            return
        if isinstance(self._code, BandCode):
            self._take_code(self._code_of(state))
        for name, held in self._kept().items():
            target = _plain(held)
            if name not in state or state[name].shape != target.shape:
                found = state[name].shape if name in state else "nothing"
                expected = tuple(target.shape)
                raise CorruptStoreError("index", name, expected=expected, found=found)
            target.copy_(torch.from_numpy(state[name].copy()))
        self._is_fitted = True

    def _kept(self) -> dict[str, Tensor]:
        """Return what scores depend on, by name."""
        kept: dict[str, Tensor | None] = {
            "basis": self._basis,
            "query_basis": self._query_basis if self.has_query_basis else None,
            "tiles": self._tiles,
            "scales": self._scales,
            "mean": self._mean,
            "offsets": self._offsets,
            "steps": self._code.steps if isinstance(self._code, BandCode) else None,
        }
        return {name: held for name, held in kept.items() if held is not None}

    def _code_of(self, state: dict[str, np.ndarray]) -> BandCode:
        """Return the banded code of which these are the arrays, its steps yet to be filled."""
        counts = [int(count) for count in state.get("counts", np.empty(0))]
        try:
            wide, middle, narrow = counts
            if sum(counts) <= self._most:
                return BandCode(self._code.rank, (wide, middle, narrow))
        except (ValueError, ConfigError):
            pass
        raise CorruptStoreError("index", "counts", expected=f"at most {self._most}", found=counts)


def _most_coefficients(geometry: KVGeometry, rank: int, code: str) -> int:
    return min(CODES[code](rank).most_coefficients, geometry.key_dim)


def _fit_bytes(geometry: KVGeometry, rank: int, code: str) -> int:
    most = _most_coefficients(geometry, rank, code)
    wide = _WIDE_TOKENS * (geometry.key_dim + 4 * most) * 4
    fit = fit_workspace_bytes(geometry.key_dim, most) + wide
    if not CODES[code].needs_fit:
        return fit
    again = KeyMoments.second_look_bytes(geometry.key_dim, _WIDE_TOKENS)
    return max(fit, again) + KeyMoments.nbytes_of(geometry.key_dim)


def _token_scratch_bytes(geometry: KVGeometry, rank: int, code: str) -> int:
    """Products in integers and floats, one more of them in flight; the codes, plain and split."""
    return 12 * geometry.num_heads + 4 * CODES[code](rank).token_bytes + 3 * 8


def _group_scratch_bytes(geometry: KVGeometry) -> int:
    return 12 * geometry.num_heads


def _block_tokens(
    geometry: KVGeometry, rank: int, code: str, num_groups: int, group_size: int
) -> int:
    """Return how many tokens are scored at once: as many as the memory of a fit has room for."""
    room = _fit_bytes(geometry, rank, code) - num_groups * _group_scratch_bytes(geometry)
    tokens = room // _token_scratch_bytes(geometry, rank, code)
    return max(_LEAST_BLOCK_TOKENS, tokens) // group_size * group_size


def _plain(tensor: Tensor) -> Tensor:
    """Look at a tensor as numbers that NumPy has: bfloat16 as 16 bits, all else as bytes."""
    return tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint8)
