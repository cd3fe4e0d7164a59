"""Which settings are rehearsed: a cost model fitted to the rehearsals so far names the next.

The settings are listed and what a rehearsal costs is known, so that no study library is needed:
each is predicted, and those not worth a rehearsal are pruned by their prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from kvswap.core.frontier import frontier
from kvswap.tune.cost import CostModel
from kvswap.tune.space import Setting

SPREAD, MOST, EDGE = 5, 20, 4
"""Rehearsals that lie far apart, of the first round in all, and of the frontier besides."""

LEADERS, TURNS = 3, 2
"""How many of the fastest are rehearsed again, in turn, and how often."""


@dataclass(eq=False, slots=True)
class Candidate:
    """A setting, what it covers, and how fast it was seen to be.

    Attributes
    ----------
    setting : Setting
    recall : float
    missing : float
        Groups that a layer does not find in memory in a step, of each sequence.
    work : ndarray
        See `kvswap.tune.cost.work_of`.
    seconds : list of float
        Of a step, in each rehearsal.
    """

    setting: Setting
    recall: float
    missing: float
    work: np.ndarray
    seconds: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """The median of its rehearsals; infinite without one."""
        return median(self.seconds) if self.seconds else float("inf")


Rehearse = Callable[[Candidate, int], float]
"""Return a step's seconds; the number says how many rehearsals the candidate has had before."""


class Search:
    """Finds the fastest of some candidates by rehearsing few of them.

    Parameters
    ----------
    candidates : sequence of Candidate
        That of the rules is the first.
    floor : float
        Least recall of what may be chosen.
    rehearse : callable
    has_time : callable
        ``has_time(count)`` says whether so many more rehearsals fit into what time is left.
    on_progress : callable
        ``on_progress(done, total)`` in rehearsals; the total falls where fewer are needed.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        *,
        floor: float,
        rehearse: Rehearse,
        has_time: Callable[[int], bool],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.candidates = candidates
        self.eligible = [each for each in candidates if each.recall >= floor]
        self._rehearse, self._has_time, self._tell = rehearse, has_time, on_progress
        self._done = 0

    @property
    def again(self) -> int:
        """Rehearsals that the leaders still get at the end."""
        return TURNS * min(LEADERS, len(self.eligible))

    def run(self) -> Candidate:
        """Rehearse what is worth it, and return the fastest that may be chosen."""
        for candidate in far_apart(self.eligible, SPREAD):
            self._try(candidate, must=candidate is self.eligible[0])
        # The rules' own first, to be compared with; others where few cover enough.
        for candidate in far_apart(self.candidates, SPREAD):
            if candidate is self.candidates[0] or self._done < SPREAD:
                self._try(candidate)
        while self._done < MOST:
            following = self._most_promising()
            if following is None or not self._try(following):
                break
        for candidate in self._edge():
            self._try(candidate)
        self._repeat_leaders()
        self._tell(self._done, self._done)
        return min(self.eligible, key=lambda each: each.step_s)

    def model(self) -> CostModel:
        """Return the cost model of all rehearsals so far."""
        tried = [each for each in self.candidates if each.seconds]
        return CostModel.fit(
            np.array([each.work for each in tried]), [each.step_s for each in tried]
        )

    def _try(self, candidate: Candidate, *, must: bool = False) -> bool:
        """Rehearse once, if it was not yet and there is time; return whether there was."""
        if candidate.seconds:
            return True
        if not must and not self._has_time(1 + self.again):
            return False
        self._hold(candidate)
        return True

    def _hold(self, candidate: Candidate) -> None:
        self._tell(self._done, max(self._done + 1, MOST + EDGE + self.again))
        candidate.seconds.append(self._rehearse(candidate, len(candidate.seconds)))
        self._done += 1

    def _most_promising(self) -> Candidate | None:
        """Return what is predicted to be faster than all by more than predictions err."""
        untried = [each for each in self.eligible if not each.seconds]
        if not untried:
            return None
        model = self.model()
        best = min(untried, key=lambda each: model.seconds(each.work))
        fastest = min(each.step_s for each in self.eligible)
        return best if model.seconds(best.work) * (1 + model.error) < fastest else None

    def _edge(self) -> list[Candidate]:
        """Return what is predicted to lie on the frontier, far apart, and was not tried."""
        model = self.model()
        known = frontier(self.candidates, speed=lambda each: -_seconds(each, model))
        line = [each for each in known if not each.seconds]
        places = np.linspace(0, len(line) - 1, min(EDGE, len(line))).round().astype(int)
        return [line[place] for place in dict.fromkeys(places.tolist())]

    def _repeat_leaders(self) -> None:
        """Rehearse the fastest again, in turn: an hour's mood is then the same for all."""
        tried = [each for each in self.eligible if each.seconds]
        leaders = sorted(tried, key=lambda each: each.step_s)[:LEADERS]
        if len(leaders) < 2:
            return
        for _ in range(TURNS):
            for candidate in leaders:
                if not self._has_time(1):
                    return
                self._hold(candidate)


def far_apart(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the first candidate, and others of which each does other work than those before."""
    work = np.array([each.work for each in candidates])
    scale = work.max(0) - work.min(0)
    places = work[:, scale > 0] / scale[scale > 0]
    chosen = [0]
    distance = np.linalg.norm(places - places[0], axis=1)
    while len(chosen) < min(count, len(candidates)) and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=1))
    return [candidates[place] for place in chosen]


def _seconds(candidate: Candidate, model: CostModel) -> float:
    return candidate.step_s if candidate.seconds else model.seconds(candidate.work)
