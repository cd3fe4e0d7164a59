"""The rolling buffer against a plain list of tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvswap.cache.rolling import RollingBuffer
from kvswap.core.geometry import KVGeometry, RecordLayout
from tests.memory import bytes_reachable_from

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 3


def layout(size: int, dtype: str = "float32") -> RecordLayout:
    geometry = KVGeometry(
        num_layers=LAYERS, num_heads=2, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype
    )
    return RecordLayout(geometry=geometry, group_size=size, block_size_bytes=512)


class NewestTokens(RuleBasedStateMachine):
    """Each layer and row of the model is a list of numbers, one a token."""

    @initialize(size=st.sampled_from([1, 2, 4]), rows=st.integers(1, 3))
    def begin(self, size: int, rows: int) -> None:
        self.size, self.next = size, 1.0
        self.buffer = RollingBuffer(layout(size), rows)
        self.model = [[[] for _ in range(rows)] for _ in range(LAYERS)]

    @property
    def rows(self) -> int:
        return len(self.model[0])

    def fresh(self, count: int) -> tuple[list[float], torch.Tensor]:
        numbers = [self.next + i for i in range(count)]
        self.next += count
        return numbers, torch.tensor(numbers).reshape(1, -1, 1).expand(KV_HEADS, -1, HEAD_DIM)

    def place(self, data: st.DataObject) -> tuple[int, int]:
        return data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, self.rows - 1))

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        layer, row = self.place(data)
        room = 2 * self.size - len(self.model[layer][row])
        numbers, tokens = self.fresh(data.draw(st.integers(0, room)))
        self.buffer.append(layer, row, tokens, -tokens)
        self.model[layer][row].extend(numbers)

    @rule(data=st.data())
    def put_a_part_of_what_it_holds(self, data: st.DataObject) -> None:
        layer, row = self.place(data)
        first = data.draw(st.integers(0, len(self.model[layer][row])))
        keys, values = self.buffer.copy_of(layer, row)
        self.buffer.put(layer, row, keys[:, first:], values[:, first:])
        del self.model[layer][row][:first]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        layer, row = self.place(data)
        length = data.draw(st.integers(0, len(self.model[layer][row])))
        self.buffer.truncate(layer, row, length)
        del self.model[layer][row][length:]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=4))
        self.buffer = self.buffer.select(np.array(rows))
        self.model = [[list(layer[row]) for row in rows] for layer in self.model]

    @rule()
    def go_on_with_a_copy(self) -> None:
        twin = self.buffer.copy()
        _, tokens = self.fresh(2 * self.size)
        for row in range(self.rows):  # what happens to the one does not happen to the other
            self.buffer.put(0, row, tokens, tokens)
        self.buffer = twin

    @rule()
    def go_on_from_a_saved_state(self) -> None:
        again = RollingBuffer(layout(self.size), self.rows)
        again.load_state({name: part.copy() for name, part in self.buffer.state().items()})
        self.buffer = again

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert self.buffer.nbytes == bytes_reachable_from(self.buffer)
        for layer, model in enumerate(self.model):
            for row, expected in enumerate(model):
                keys, values = self.buffer.get(layer, row)
                assert keys.shape == (KV_HEADS, len(expected), HEAD_DIM)
                assert (keys == torch.tensor(expected).reshape(1, -1, 1)).all()
                assert torch.equal(values, -keys)


TestNewestTokens = NewestTokens.TestCase
TestNewestTokens.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)
