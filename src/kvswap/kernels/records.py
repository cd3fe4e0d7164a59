"""Keys and values into records and back: K then V, each [kv_head, token, head_dim]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import RecordLayout
from kvswap.kernels.codecs import CODEC_NUMBERS, decode, encode, rotation_of
from kvswap.kernels.native import DTYPE_CODES, native, tokens_view

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NativeShape = tuple[int, int, int, int, int, int, int]


def record_view(records: np.ndarray | Tensor, layout: RecordLayout) -> Tensor:
    """See records as keys and values, or as their codes, without a copy.

    Parameters
    ----------
    records : ndarray or Tensor [num_records, record_bytes], uint8
        Slots, staging rows or anything else of the record's form.
    layout : RecordLayout
        Shape of a record.

    Returns
    -------
    Tensor [num_records, 2, num_kv_heads, group_size, head_dim or row_bytes]
        In the layout's dtype, or uint8 where records are coded. Index 1 is 0 for keys, 1 for
        values. Shares memory with ``records``.
    """
    geometry = layout.geometry
    bytes_ = records if isinstance(records, Tensor) else torch.from_numpy(records)
    shape = (2, geometry.num_kv_heads, layout.group_size)
    if layout.codec == "raw":
        elements, row = bytes_.view(DTYPES[geometry.dtype]), geometry.head_dim
    else:
        elements, row = bytes_, layout.row_bytes
    return elements[:, : int(np.prod(shape)) * row].unflatten(1, (*shape, row))


def native_shape(layout: RecordLayout) -> NativeShape:
    """Return what native kernels are told of a layout; its addresses stay valid."""
    geometry, addresses = layout.geometry, (0, 0)
    if layout.codec != "raw":
        addresses = rotation_of(geometry.head_dim).addresses
    dtype = DTYPE_CODES[DTYPES[geometry.dtype]]
    sizes = (layout.group_size, geometry.num_kv_heads, geometry.head_dim)
    return (*sizes, dtype, CODEC_NUMBERS[layout.codec], *addresses)


def address_of(centre: Tensor | None) -> int:
    """Return what native kernels are told of a centre; 0 for none."""
    return 0 if centre is None else centre.data_ptr()


def pack_groups(
    keys: Tensor,
    values: Tensor,
    records: np.ndarray | Tensor,
    layout: RecordLayout,
    centre: Tensor | None = None,
) -> None:
    """Lay whole groups of tokens out as records, in the layout's codec.

    Parameters
    ----------
    keys, values : Tensor [num_kv_heads, num_groups * group_size, head_dim]
        Consecutive tokens of one sequence.
    records : ndarray or Tensor [num_groups, record_bytes], uint8
        What to fill; padding is left alone.
    layout : RecordLayout
        Shape of a record.
    centre : Tensor [2, num_kv_heads, head_dim], float32, optional
        What is taken off keys and values before they are coded; default: nothing.
    """
    view, module = record_view(records, layout), native()
    dtype = DTYPES[layout.geometry.dtype]
    is_plain = keys.stride(2) == values.stride(2) == 1 and keys.dtype == values.dtype == dtype
    if module is not None and is_plain and keys.device.type == view.device.type == "cpu":
        stride_bytes = view.stride(0) * view.element_size()
        tokens = tokens_view(keys, values)
        shape, middle = native_shape(layout), address_of(centre)
        module.pack(tokens, view.data_ptr(), stride_bytes, len(view), shape, middle)
        return
    groups = (view.shape[0], view.shape[3])
    for half, one in enumerate((keys, values)):
        grouped = one.unflatten(1, groups).transpose(0, 1)
        if layout.codec != "raw":
            taken_off = None if centre is None else centre[half, :, None]
            grouped = encode(grouped, layout.codec, taken_off)
        view[:, half].copy_(grouped)


def unpack_groups(
    records: np.ndarray,
    layout: RecordLayout,
    room: np.ndarray | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Bring each head's tokens together.

    Parameters
    ----------
    records : ndarray [num_records, record_bytes], uint8
        On the host.
    layout : RecordLayout
        Shape of a record.
    room : ndarray, uint8, optional
        Memory for the answer, at least ``num_records * plain_bytes``; default: its own.
    centre : Tensor [2, num_kv_heads, head_dim], float32, optional
        As they were packed with.

    Returns
    -------
    Tensor [2, num_kv_heads, num_records * group_size, head_dim], the layout's dtype
    """
    geometry, dtype, count = layout.geometry, DTYPES[layout.geometry.dtype], len(records)
    shape = (2, geometry.num_kv_heads, count, layout.group_size, geometry.head_dim)
    if room is None:
        out = torch.empty(shape, dtype=dtype)
    else:
        nbytes = count * layout.plain_bytes
        out = torch.from_numpy(room.reshape(-1)[:nbytes]).view(dtype).view(shape)
    module = native()
    if layout.codec != "raw" and module is not None:
        address, stride_bytes = records.__array_interface__["data"][0], records.strides[0]
        halves = (out[0].data_ptr(), out[1].data_ptr())
        form, middle = native_shape(layout), address_of(centre)
        module.unpack(address, stride_bytes, count, form, middle, *halves)
    else:
        view = record_view(records, layout)
        taken_off = None if centre is None else centre[:, :, None]
        apart = view if layout.codec == "raw" else decode(view, layout.codec, taken_off)
        out.copy_(apart.permute(1, 2, 0, 3, 4))
    return out.flatten(2, 3)


def gather_groups(view: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Collect the tokens of some records.

    Parameters
    ----------
    view : Tensor [num_records, 2, num_kv_heads, group_size, head_dim]
        From `record_view`.
    rows : Tensor [n], int64
        Which records, in the order wanted.

    Returns
    -------
    keys, values : Tensor [num_kv_heads, n * group_size, head_dim]
        One copy is made; of codes where records are coded.
    """
    both = view.permute(1, 2, 0, 3, 4).index_select(2, rows).flatten(2, 3)
    return both[0], both[1]
