"""llama.cpp in memory: the same shape with random float16 weights, its cache filled by its state.

The weights are a GGUF file made here. A short context's state shows the form in which
llama.cpp takes a sequence back; a random one of the whole length in that form is handed to
`llama_state_seq_set_data`. Steps then attend to all of it. Both attention settings are tried
and the faster one stays.
"""

from __future__ import annotations

import ctypes
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from serving import arguments, serve

TRIAL_STEPS = 4
TOKEN = 5
BLOCK_ROWS = 512


def write_weights(path: Path, shape: dict[str, Any], rng: np.random.Generator) -> None:
    """Make the model's file."""
    hidden, inner, heads = (
        shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"],
    )  # fmt: skip
    dim, kv_heads = shape["head_dim"], shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(shape.get("rope_theta", 1e6))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), np.float32) * 0.02
        writer.add_tensor(name, values.astype(np.float16))

    def norm(name: str, length: int) -> None:
        writer.add_tensor(name, np.ones(length, np.float32))

    matrix("token_embd.weight", shape["vocab_size"], hidden)  # the head too, as in the shape
    norm("output_norm.weight", hidden)
    for layer in range(shape["num_hidden_layers"]):
        at = f"blk.{layer}."
        norm(at + "attn_norm.weight", hidden)
        norm(at + "ffn_norm.weight", hidden)
        norm(at + "attn_q_norm.weight", dim)
        norm(at + "attn_k_norm.weight", dim)
        matrix(at + "attn_q.weight", heads * dim, hidden)
        matrix(at + "attn_k.weight", kv_heads * dim, hidden)
        matrix(at + "attn_v.weight", kv_heads * dim, hidden)
        matrix(at + "attn_output.weight", hidden, heads * dim)
        matrix(at + "ffn_gate.weight", inner, hidden)
        matrix(at + "ffn_up.weight", inner, hidden)
        matrix(at + "ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """One llama.cpp context with a full cache."""

    def __init__(self, model: Any, args: Any, *, flash: bool) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = args.context + args.room
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = int(flash)
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
        self._handle = llama_cpp.llama_init_from_model(model, params)
        if not self._handle:
            raise SystemExit("llama.cpp could not make a context")
        self._token = (llama_cpp.llama_token * 1)(TOKEN)
        self.fill(args)

    def decode(self) -> float:
        """Decode one token and return its seconds."""
        begin = time.perf_counter()
        batch = llama_cpp.llama_batch_get_one(self._token, 1)
        if llama_cpp.llama_decode(self._handle, batch):
            raise SystemExit("llama.cpp could not decode")
        llama_cpp.llama_synchronize(self._handle)
        return time.perf_counter() - begin

    def length(self) -> int:
        """Return how many tokens the cache holds."""
        memory = llama_cpp.llama_get_memory(self._handle)
        return int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1

    def fill(self, args: Any) -> None:
        """Give the cache a random state of the whole context."""
        self.decode()
        size = llama_cpp.llama_state_seq_get_size(self._handle, 0)
        small = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._handle, small, size, 0)
        path = args.directory / "state.bin"
        lengthen(bytes(small), path, args.context, np.random.default_rng(args.seed))
        state = np.memmap(path, np.uint8, "r")
        pointer = ctypes.cast(state.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        taken = llama_cpp.llama_state_seq_set_data(self._handle, pointer, len(state), 0)
        path.unlink()
        if not taken or self.length() != args.context:
            raise SystemExit("llama.cpp did not take the state")

    def close(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_free(self._handle)


def lengthen(small: bytes, path: Path, cells: int, rng: np.random.Generator) -> None:
    """Write a state of many cells in the form that the state of one cell shows.

    The form (llama.cpp's own): streams, cells, then position and sequences of each cell; then
    whether values are transposed, and the layers: of each the type and row size of its keys
    and their rows, then the same of its values.
    """
    head = small.index(struct.pack("<IIiI", 1, 1, 0, 1))  # one stream, one cell at position 0
    at = head + 16 + 4
    cell = small[head + 16 : at]  # the sequence that it belongs to
    transposed, layers = struct.unpack_from("<II", small, at)
    at += 8
    block = rng.standard_normal(1 << 20, np.float32).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(small[:head] + struct.pack("<II", 1, cells))
        file.write(b"".join(struct.pack("<iI", place, 1) + cell for place in range(cells)))
        file.write(struct.pack("<II", transposed, layers))

        def rows(nbytes: int) -> None:
            while nbytes:
                part = block[: min(nbytes, len(block))]
                file.write(part)
                nbytes -= len(part)

        for side in ("keys", "values"):
            for _ in range(layers):
                if side == "values" and transposed:
                    length, width = 12, struct.unpack_from("<iII", small, at)
                    row = width[1] * width[2]
                else:
                    length, row = 12, struct.unpack_from("<iQ", small, at)[1]
                file.write(small[at : at + length])
                at += length + row
                rows(row * cells)
    if at != len(small):
        raise SystemExit("llama.cpp's state has another form than this script knows")


def main() -> None:
    """Make the model, try both settings, and serve steps with the faster one."""
    args = arguments(__doc__)
    path = args.directory / "weights.gguf"
    write_weights(path, args.shape, np.random.default_rng(args.seed))
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit("llama.cpp could not load the model")
    trials: dict[str, list[float]] = {}
    for flash in (False, True):
        context = Context(model, args, flash=flash)
        context.decode()
        trials["flash" if flash else "plain"] = [context.decode() for _ in range(TRIAL_STEPS)]
        context.close()
    faster = min(trials, key=lambda name: float(np.median(trials[name])))
    context = Context(model, args, flash=faster == "flash")
    serve(
        lambda _: context.decode(),
        peer="llama.cpp",
        version=llama_cpp.__version__,
        trials_s=trials,
        attention=faster,
        dtype="float16",
        filled_by="llama_state_seq_set_data with random keys and values",
        context=context.length(),
    )


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: Any) -> None:
    """Say nothing."""


if __name__ == "__main__":
    main()
