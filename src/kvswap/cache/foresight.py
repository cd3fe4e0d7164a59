"""Where prediction pays: every layer tries with and without, and goes on with what cost less."""

from __future__ import annotations

_WARM_STEPS = 2  # after a prefill everything is read, whatever was foreseen
_TRIAL_STEPS = 8  # in turn with and without
_HOLD_STEPS = 256  # then both are tried again


class Foresight:
    """Sets, layer by layer, the time that prediction takes against the stall that it saves.

    On a fast device a read costs less than the estimate and the scoring that would foresee it;
    on a slow one the reads of a step are most of its time. What is read ahead depends on it,
    never what is attended to.

    Parameters
    ----------
    num_layers : int
        Of the model: a layer's head groups are predicted together.
    """

    def __init__(self, num_layers: int) -> None:
        self._turn = [0] * num_layers
        self._spent = [[0.0, 0.0] for _ in range(num_layers)]  # without and with prediction
        self._pays = [True] * num_layers

    def is_worth_it(self, layer_idx: int) -> bool:
        """Whether to predict a layer in this step."""
        turn = self._turn[layer_idx]
        if _WARM_STEPS <= turn < _WARM_STEPS + _TRIAL_STEPS:
            return turn % 2 == 1
        return self._pays[layer_idx]

    def spend(self, layer_idx: int, seconds: float) -> None:
        """Note what the prediction for a layer took in this step."""
        self._spent[layer_idx][1] += seconds

    def learn(self, layer_idx: int, stall_s: float, *, is_last: bool = True) -> None:
        """Note how long a layer waited for its reads.

        Called once a step, or once for each of its head groups; ``is_last`` ends the step.
        """
        turn, spent = self._turn[layer_idx], self._spent[layer_idx]
        spent[self.is_worth_it(layer_idx)] += stall_s
        if not is_last:
            return
        turn += 1
        if turn == _WARM_STEPS:
            spent[:] = [0.0, 0.0]
        if turn == _WARM_STEPS + _TRIAL_STEPS:
            self._pays[layer_idx] = spent[1] < spent[0]
        if turn == _WARM_STEPS + _TRIAL_STEPS + _HOLD_STEPS:
            turn = _WARM_STEPS
            spent[:] = [0.0, 0.0]
        self._turn[layer_idx] = turn
