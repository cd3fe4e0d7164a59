"""How many groups can be read in time follows from what was measured, by a clock of the test's."""

from __future__ import annotations

from kvswap.cache.deadline import Deadline


class Layers:
    """Layers of a model whose compute and reads take as long as a test says."""

    def __init__(self, group_s: float, window_s: float, *, own_s: float = 0.0) -> None:
        self.group_s, self.window_s, self.own_s = group_s, window_s, own_s
        self.now = 0.0
        self.deadline = Deadline(2, lambda: self.now)

    def step(self, wanted: int, *, layer_idx: int = 0, own: int = 0) -> tuple[int, float]:
        """Run a layer that wants so many groups; return what it reads ahead, and its stall."""
        limit = self.deadline.limit(layer_idx, is_ahead=True)
        count = wanted if limit is None else min(limit, wanted)
        done = self.now + count * self.group_s
        self.deadline.submitted(layer_idx, count, limit, is_ahead=True)
        self.now += self.window_s - self.own_s
        if own:
            limit = self.deadline.limit(layer_idx, is_ahead=False)
            more = own if limit is None else min(limit, own)
            done = max(done, self.now) + more * self.group_s
            self.deadline.submitted(layer_idx, more, limit, is_ahead=False)
        self.now += self.own_s
        self.deadline.attends(layer_idx)
        stall = max(0.0, done - self.now)
        self.now += stall
        self.deadline.arrived(layer_idx, stall)
        return count, stall


def test_before_anything_is_measured_there_is_no_limit():
    deadline = Layers(1.0, 1.0).deadline
    assert deadline.limit(0, is_ahead=True) is None
    assert deadline.limit(0, is_ahead=False) is None


def test_after_a_stall_a_layer_reads_what_fits_its_time():
    layers = Layers(group_s=0.5, window_s=10.0)
    assert layers.step(100) == (100, 40.0)
    assert layers.step(100) == (20, 0.0)


def test_reads_that_came_in_time_may_grow_until_they_do_not():
    layers = Layers(group_s=0.5, window_s=10.0)
    layers.step(100)
    counts = [layers.step(100)[0] for _ in range(40)]
    assert min(counts) >= 17
    assert max(counts) <= 24
    layers.group_s = 0.25  # the device is faster now
    assert [layers.step(100)[0] for _ in range(40)][-1] >= 34
    layers.group_s = 1.0
    assert [layers.step(100)[0] for _ in range(40)][-1] <= 13


def test_at_least_one_group_is_read_or_nothing_would_be_measured():
    layers = Layers(group_s=50.0, window_s=1.0)
    layers.step(3)
    assert [layers.step(3)[0] for _ in range(3)] == [1, 1, 1]
    layers.group_s = 0.01
    assert [layers.step(3)[0] for _ in range(60)][-1] == 3


def test_what_is_on_its_way_counts_in_what_its_own_query_may_ask_for():
    layers = Layers(group_s=0.5, window_s=10.0, own_s=4.0)
    layers.step(30, own=30)
    limit = layers.deadline.limit(0, is_ahead=True)
    layers.deadline.submitted(0, limit, limit, is_ahead=True)
    at_once = layers.deadline.limit(0, is_ahead=False)
    layers.now += 100.0
    assert (at_once, layers.deadline.limit(0, is_ahead=False)) == (1, 8)


def test_layers_have_their_own_time_and_share_the_rate():
    layers = Layers(group_s=0.5, window_s=10.0)
    layers.step(100)
    assert layers.deadline.limit(1, is_ahead=True) is None
    layers.window_s = 2.0
    layers.step(10, layer_idx=1)
    assert layers.deadline.limit(1, is_ahead=True) == 4
    assert layers.deadline.limit(0, is_ahead=True) == 20


def test_what_an_interrupted_forward_asked_for_is_forgotten():
    layers = Layers(group_s=0.5, window_s=10.0, own_s=4.0)
    layers.step(30, own=30)
    layers.deadline.submitted(0, 100, None, is_ahead=True)
    layers.deadline.forget_step()
    assert layers.deadline.limit(0, is_ahead=False) == 8
