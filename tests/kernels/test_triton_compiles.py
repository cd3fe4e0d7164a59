"""Triton's kernels compile for a GPU, which needs none, and fit the memory that all of them have.

The interpreter of the other tests takes more than the compiler does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvswap.kernels.native import has_triton

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
    pytest.mark.slow,
]
LEAST_SHARED_BYTES = 99 * 1024  # a block's on compute capability 8.6 and 8.9

BUILD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvswap.kernels.gpu.attend import attend_splits, merge_splits
from kvswap.kernels.gpu.scan import scan_groups
from kvswap.kernels.gpu.slots import NUM_STAGES, block_of

def build(kernel, kinds, constants, **options):
    kinds = {name: "constexpr" if name in constants else kinds(name) for name in kernel.arg_names}
    wide = [i for i, name in enumerate(kernel.arg_names) if kinds[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in wide}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 80, 32)
    return triton.compile(source, target=target, options=options).metadata.shared

def attend(dtype, itemsize, head_dim, softcap):
    floats = {"out": "*fp32", "lse": "*fp32", "scaling": "fp32", "softcap": "fp32"}
    sources = ("query", "slots", *(f"{a}_{b}" for a in ("rolling", "newest")
               for b in ("keys", "values")))
    kinds = {**floats, "slot_rows": "*i64", **dict.fromkeys(sources, f"*{dtype}")}
    block = block_of(head_dim, itemsize)
    return build(attend_splits, lambda name: kinds.get(name, "i32"), dict(
        SHARED=4, NUM_KV_HEADS=8, GROUP_SIZE=4, HEAD_DIM=head_dim, HAS_SOFTCAP=softcap,
        IS_WIDE=False, BLOCK_ROWS=block, BLOCK_TOKENS=block, BLOCK_DIM=head_dim,
    ), num_stages=NUM_STAGES)

def scan(code, kind, columns, chunks, chunk):
    floats = dict.fromkeys(("query_scales", "query_offsets", "out"), "*fp32")
    codes = {"tiles": kind, "scales": "*fp16", "queries": "*fp16", "groups": "*i64"}
    if code == "bf16":
        codes |= {"queries": "*bf16", "scales": "*fp32"}
    return build(scan_groups, lambda name: (floats | codes).get(name, "i32"), dict(
        CODE=code, BITS=int(code[3:]) if code[:3] == "rot" else 0, HAS_IDS=code == "int8",
        RANK=128, COLUMNS=columns, CHUNKS=chunks, CHUNK=chunk, TILE=16, GROUP_SIZE=4,
        IS_WIDE=False, BLOCK_GROUPS=32, BLOCK_QUERIES=64, BLOCK_COLUMNS=min(64, columns),
    ))

def merge():
    return build(
        merge_splits, lambda name: "i32" if name.startswith("num") else "*fp32",
        dict(HEAD_DIM=128, BLOCK_SPLITS=8, BLOCK_DIM=128),
    )

print(json.dumps({call: eval(call) for call in sys.argv[1:]}))
"""


CALLS = [
    "attend('bf16', 2, 128, False)",
    "attend('fp16', 2, 64, True)",
    "attend('bf16', 2, 256, False)",
    "attend('fp32', 4, 128, False)",
    "merge()",
    "scan('rot4', '*u8', 64, 16, 4)",
    "scan('rot2', '*u8', 32, 8, 4)",
    "scan('rot1', '*u8', 16, 4, 4)",
    "scan('int8', '*u8', 128, 32, 4)",
    "scan('bf16', '*bf16', 128, 64, 2)",
]


def test_every_kernel_compiles_and_fits(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *CALLS],
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared_bytes = json.loads(done.stdout)
    assert list(shared_bytes) == CALLS
    too_large = {call: size for call, size in shared_bytes.items() if size > LEAST_SHARED_BYTES}
    assert not too_large
