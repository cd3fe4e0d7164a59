"""Where a scan in two levels pays: an index measures, tries, and goes on with what was better."""

from __future__ import annotations

_MEASURED = 8  # calls over which a flat scan is timed
_TRIED = 4  # calls in two levels
_HELD = 256  # then both are done again
LEAST_SHARE = 0.1
"""Of the step: below it a layer's scan is not worth a trial."""
MOST_SCORED = 0.5
"""Of all rows: above it two levels cost what one does, or more."""


class Levels:
    """Sets the time of a layer's scan against the step's, and counts what bounds leave to score.

    What is selected never depends on it: both ways give the same best groups.

    Parameters
    ----------
    num_layers : int
        Indexes that are scanned in a step.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._turn = 0
        self._first_s = self._began_s = self._scan_s = self._scored = 0.0
        self._is_long = self._pays = False

    def begin(self, now_s: float) -> bool:
        """Say whether this call is to scan in two levels."""
        if self._turn == 0:
            self._first_s, self._scan_s, self._scored = now_s, 0.0, 0.0
        if self._turn == _MEASURED:
            spent_s = now_s - self._first_s
            self._is_long = self._num_layers * self._scan_s >= LEAST_SHARE * spent_s
        self._began_s = now_s
        if self._turn < _MEASURED:
            return False
        return self._is_long if self._turn < _MEASURED + _TRIED else self._pays

    def end(self, now_s: float, scored: float) -> None:
        """Note when the call ended, and the share of rows that it scored."""
        if self._turn < _MEASURED:
            self._scan_s += now_s - self._began_s
        elif self._turn < _MEASURED + _TRIED:
            self._scored += scored / _TRIED
        self._turn += 1
        if self._turn == _MEASURED + _TRIED:
            self._pays = self._is_long and self._scored <= MOST_SCORED
        if self._turn == _MEASURED + _TRIED + _HELD:
            self._turn = 0
