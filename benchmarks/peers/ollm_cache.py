"""oLLM's disk cache: every layer whole from its file in each step.

Its own cache class, loaded from the file of the installed package that holds it (the package
itself replaces parts of transformers when imported, and wants a GPU's libraries), runs inside
transformers' own model of the shape with random weights. Before a step the files' pages are
dropped from the page cache, as they would not be there where the cache does not fit into
memory; a step asked for as "warm" leaves them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from serving import arguments, serve


def load_cache_module() -> ModuleType:
    """Return the module of the package that holds its cache, alone."""
    spec = importlib.util.find_spec("ollm")
    if spec is None or spec.origin is None:
        raise SystemExit("ollm is not installed in this Python")
    path = Path(spec.origin).with_name("kvcache.py")
    alone = importlib.util.spec_from_file_location("ollm_kvcache", path)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module


def make_model(shape: dict[str, Any]) -> Any:
    """Return the model, with random weights in bfloat16."""
    settings = dict(shape)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(torch.bfloat16).eval()


def drop_pages(folder: Path) -> None:
    """Let go of what the page cache holds of a folder's files."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@torch.no_grad()
def main() -> None:
    """Fill the cache and serve steps."""
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = make_model(args.shape)
    cache = load_cache_module().KVCache(cache_dir=str(args.directory), device="cpu")
    size = (1, args.shape["num_key_value_heads"], args.context, args.shape["head_dim"])
    for layer_idx in range(args.shape["num_hidden_layers"]):
        cache.update(torch.randn(size), torch.randn(size), layer_idx)
    folder = Path(cache.cache_folder)
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    token = torch.tensor([[5]])

    def step(words: list[str]) -> float:
        if "warm" not in words:
            drop_pages(folder)
        begin = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        return time.perf_counter() - begin

    serve(
        step,
        peer="oLLM's KVCache",
        version=importlib.metadata.version("ollm"),
        transformers=transformers.__version__,
        torch=torch.__version__,
        dtype="bfloat16",
        bytes_on_disk=nbytes,
        context=args.context,
    )


if __name__ == "__main__":
    main()
