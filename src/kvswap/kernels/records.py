"""Keys and values into records and back: K then V, each [kv_head, token, head_dim]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import RecordLayout
from kvswap.kernels.native import DTYPE_CODES, native, tokens_view

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def record_view(records: np.ndarray | Tensor, layout: RecordLayout) -> Tensor:
    """See records as keys and values, without a copy.

    Parameters
    ----------
    records : ndarray or Tensor [num_records, record_bytes], uint8
        Slots, staging rows or anything else of the record's form.
    layout : RecordLayout
        Shape of a record.

    Returns
    -------
    Tensor [num_records, 2, num_kv_heads, group_size, head_dim], the layout's dtype
        Index 1 is 0 for keys, 1 for values. Shares memory with ``records``.
    """
    geometry = layout.geometry
    bytes_ = records if isinstance(records, Tensor) else torch.from_numpy(records)
    elements = bytes_.view(DTYPES[geometry.dtype])
    shape = (2, geometry.num_kv_heads, layout.group_size, geometry.head_dim)
    return elements[:, : int(np.prod(shape))].unflatten(1, shape)


def pack_groups(keys: Tensor, values: Tensor, view: Tensor) -> None:
    """Lay whole groups of tokens out as records.

    Parameters
    ----------
    keys, values : Tensor [num_kv_heads, num_groups * group_size, head_dim]
        Consecutive tokens of one sequence.
    view : Tensor [num_groups, 2, num_kv_heads, group_size, head_dim]
        Records to fill, from `record_view`.
    """
    module = native()
    is_plain = keys.stride(2) == values.stride(2) == 1 and keys.dtype == view.dtype
    if module is not None and is_plain and keys.device.type == view.device.type == "cpu":
        count, _, num_kv_heads, group_size, head_dim = view.shape
        module.pack(
            tokens_view(keys, values),
            view.data_ptr(),
            view.stride(0) * view.element_size(),
            count,
            group_size,
            num_kv_heads,
            head_dim,
            DTYPE_CODES[view.dtype],
        )
        return
    groups = (view.shape[0], view.shape[3])
    view[:, 0].copy_(keys.unflatten(1, groups).transpose(0, 1))
    view[:, 1].copy_(values.unflatten(1, groups).transpose(0, 1))


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
        One copy is made.
    """
    both = view.permute(1, 2, 0, 3, 4).index_select(2, rows).flatten(2, 3)
    return both[0], both[1]
