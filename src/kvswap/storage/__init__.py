"""Bytes in, bytes out: records on a device, checked and counted."""

from kvswap.storage.base import Batch, Extents, IOBackend, Ticket, Transfer
from kvswap.storage.store import BlockStore

__all__ = ["Batch", "BlockStore", "Extents", "IOBackend", "Ticket", "Transfer"]
