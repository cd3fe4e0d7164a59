"""Bytes in, bytes out: records on a device, checked and counted."""

from kvswap.storage.base import Extents, IOBackend, Ticket, Transfer
from kvswap.storage.store import BlockStore

__all__ = ["BlockStore", "Extents", "IOBackend", "Ticket", "Transfer"]
