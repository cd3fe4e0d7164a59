"""A memory budget as people state it: a size, or a share of the full cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kvswap.core.errors import ConfigError
from kvswap.core.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for the KV cache.

    Attributes
    ----------
    amount : int or Fraction
        Bytes, or a share of the document's full keys and values.
    """

    amount: int | Fraction

    @classmethod
    def parse(cls, text: str, *, field: str = "kv_memory") -> Budget:
        """Read ``256MiB`` or ``1/16``.

        Raises
        ------
        ConfigError
            If it is neither a positive size nor a share in (0, 1].
        """
        share = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if share is None:
            try:
                return cls(parse_bytes(text, field=field))
            except ConfigError as error:
                raise ConfigError(
                    f"{field} must be a size such as 256MiB or a share such as 1/16, got {text!r}"
                ) from error
        above, below = int(share[1]), int(share[2])
        if not 0 < above <= below:
            raise ConfigError(f"{field} must be a share in (0, 1], got {text!r}")
        return cls(Fraction(above, below))

    def bytes_of(self, full_bytes: int) -> int:
        """Return the budget for a document whose full cache has so many bytes."""
        return int(self.amount if isinstance(self.amount, int) else self.amount * full_bytes)

    def __str__(self) -> str:
        return str(self.amount) + (" bytes" if isinstance(self.amount, int) else " of full KV")
