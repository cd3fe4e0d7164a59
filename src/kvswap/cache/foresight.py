"""Where prediction pays: layers whose reads it foresees go on being predicted, others rest."""

from __future__ import annotations

_ENOUGH = 0.25  # of the groups a layer had to read, the share that was foreseen
_MEMORY = 0.75  # weight of the past in the running share
_REST_STEPS = 32  # then a resting layer is tried again


class Foresight:
    """Keeps score, layer by layer, of what prediction read ahead and was then selected.

    A prediction costs a scoring of its own. Where the residual changes much from one layer to
    the next it foresees little, and last step's selection serves as well for nothing. Only
    what is read ahead depends on it, never what is attended to.

    Parameters
    ----------
    num_layers : int
    """

    def __init__(self, num_layers: int) -> None:
        self._share = [1.0] * num_layers
        self._rest = [0] * num_layers

    def is_worth_it(self, layer_idx: int) -> bool:
        """Whether to predict a layer in this step; called once a step and layer."""
        if self._rest[layer_idx]:
            self._rest[layer_idx] -= 1
            return False
        return True

    def learn(self, layer_idx: int, *, foreseen: int, late: int) -> None:
        """Note how many groups of a predicted layer were read ahead in time, and how many late."""
        if not foreseen + late:
            return
        share = foreseen / (foreseen + late)
        self._share[layer_idx] += (1 - _MEMORY) * (share - self._share[layer_idx])
        if self._share[layer_idx] < _ENOUGH:
            self._rest[layer_idx] = _REST_STEPS
            self._share[layer_idx] = _ENOUGH  # one good step brings it back, one bad step not
