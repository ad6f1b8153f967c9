"""How several things are timed against each other: in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from attrs import frozen


@frozen
class Timing:
    """What a thing took.

    ms: the median of the rounds
    spread: distance of the rounds' quartiles, as a share of the median
    rounds: how many
    """

    ms: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Timing:
        """Return the timing of some rounds, in milliseconds."""
        low, median, high = np.percentile(rounds, [25, 50, 75])
        return cls(float(median), float((high - low) / median), len(rounds))


def timed(
    things: Sequence[Callable[[], object]],
    *,
    warmup: int,
    runs: int,
    rounds: int,
    spread: float,
    repeats: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time things in turn: in each round all of them, each a few times, in an order that changes with the round.

    spread: what is wider spread is timed again with all rounds anew, `repeats` times; the narrowest counts
    """
    for thing in things:
        for _ in range(warmup):
            thing()
    timings = _rounds(things, runs, rounds, clock)
    for _ in range(repeats):
        wide = [i for i, timing in enumerate(timings) if timing.spread > spread]
        if not wide:
            break
        for i, again in zip(wide, _rounds([things[i] for i in wide], runs, rounds, clock), strict=True):
            timings[i] = min(timings[i], again, key=lambda timing: timing.spread)
    return timings


def _rounds(things: Sequence[Callable[[], object]], runs: int, rounds: int, clock: Callable[[], float]) -> list[Timing]:
    seconds: list[list[float]] = [[] for _ in things]
    order = np.random.default_rng(0)  # of its own: what is timed next to what is no part of a run
    for _ in range(rounds):
        for i in order.permutation(len(things)):
            thing = things[i]
            thing()  # what ran before has left caches that are not its own
            taken = []
            for _ in range(runs):
                start = clock()
                thing()
                taken.append(clock() - start)
            seconds[i].append(float(np.median(taken)))
    return [Timing.of([1e3 * each for each in own]) for own in seconds]
