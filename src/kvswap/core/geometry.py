"""The shape of a model's cache, and of one record on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from kvswap.core.errors import ConfigError
from kvswap.core.units import align_up

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

RECORD_CODECS = {"raw": 1, "int8": 8, "rot4": 16}
"""Forms that records hold tokens in, each with the fewest elements a head needs for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """What a model keeps for a token.

    Parameters
    ----------
    num_layers : int
        Layers whose cache is on disk (full attention only); with heads that are split into
        groups, each group of a layer is a layer (`split`).
    num_heads, num_kv_heads : int
        Query heads, and the heads they share keys and values of.
    head_dim : int
        Length of one head's key, and of its value.
    dtype : str
        ``float32``, ``bfloat16`` or ``float16``.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}),"
                f" got {self.num_heads}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def key_dim(self) -> int:
        """Length of one token's key over all KV heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.key_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * self.layer_token_bytes

    def split(self, head_groups: int) -> KVGeometry:
        """Return the geometry in which each head group of a layer is a layer of its own.

        Raises
        ------
        ConfigError
            If the KV heads cannot be split into so many groups of the same size.
        """
        if head_groups < 1 or self.num_kv_heads % head_groups:
            raise ConfigError(
                f"head_groups must divide the model's {self.num_kv_heads} KV heads,"
                f" got {head_groups}"
            )
        return replace(
            self,
            num_layers=self.num_layers * head_groups,
            num_heads=self.num_heads // head_groups,
            num_kv_heads=self.num_kv_heads // head_groups,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """One group of one layer on disk: K then V, each [kv_head, token, head_dim], padded.

    Tokens are in the model's dtype (codec ``raw``), or turned and stored in eight or four bits
    an element (``int8``, ``rot4``), which spell their scale too: see `kvswap.kernels.codecs`.

    Parameters
    ----------
    geometry : KVGeometry
        Shape of the cache, each head group of a layer being a layer.
    group_size : int
        Tokens in a group.
    block_size_bytes : int
        The device's unit; a record is a whole number of blocks.
    codec : {"raw", "int8", "rot4"}
        Form of a token.
    """

    geometry: KVGeometry
    group_size: int
    block_size_bytes: int = 4096
    codec: str = "raw"

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= 256 or self.group_size & (self.group_size - 1):
            raise ConfigError(
                f"group_size must be a power of two in [1, 256], got {self.group_size}"
            )
        if self.block_size_bytes < 512 or self.block_size_bytes & (self.block_size_bytes - 1):
            raise ConfigError(
                "block_size_bytes must be a power of two of at least 512,"
                f" got {self.block_size_bytes}"
            )
        if self.codec not in RECORD_CODECS:
            known = ", ".join(RECORD_CODECS)
            raise ConfigError(f"record_codec must be one of {known}, got {self.codec!r}")
        least, dim = RECORD_CODECS[self.codec], self.geometry.head_dim
        if dim < least or (self.codec == "rot4" and dim % 2):
            raise ConfigError(
                f"record_codec must be raw for heads of {dim} elements ({self.codec} needs at"
                f" least {least}, an even number for rot4), got {self.codec!r}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key, or value, of one head."""
        dim = self.geometry.head_dim
        if self.codec == "raw":
            return dim * DTYPE_BYTES[self.geometry.dtype]
        return dim if self.codec == "int8" else dim // 2

    @property
    def plain_bytes(self) -> int:
        """Bytes of a group's keys and values in the model's dtype."""
        return self.group_size * self.geometry.layer_token_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of keys and values in a record."""
        return 2 * self.group_size * self.geometry.num_kv_heads * self.row_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of a record on disk and of a slot in memory, padding included."""
        return align_up(self.payload_bytes, self.block_size_bytes)

    @property
    def halves_fill_blocks(self) -> bool:
        """Whether keys fill whole blocks, and values too, so that either can be read alone."""
        return self.payload_bytes % (2 * self.block_size_bytes) == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; the codec is left out where it is raw."""
        codec = {} if self.codec == "raw" else {"codec": self.codec}
        return {
            "geometry": self.geometry.to_dict(),
            "group_size": self.group_size,
            "block_size_bytes": self.block_size_bytes,
        } | codec

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RecordLayout:
        """Rebuild a layout from `to_dict`."""
        return cls(
            geometry=KVGeometry(**fields["geometry"]),
            group_size=fields["group_size"],
            block_size_bytes=fields["block_size_bytes"],
            codec=fields.get("codec", "raw"),
        )
