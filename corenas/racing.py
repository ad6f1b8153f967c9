"""Whether an arch that has seen some of the images can still be as good as another one that has seen all of them."""

from __future__ import annotations

import numpy as np

_BETS = tuple(0.5 / 2**k for k in range(6))
"""How much of its capital a gambler stakes: each is best for another distance between two archs. None can go broke."""


def evidence(differences: np.ndarray, total: int) -> np.ndarray:
    """Return the evidence, after each image, that an arch will have lost against another one after `total` images.

    differences: (…, images seen), the arch's score of each image less the other's, both from 0 to 1; the images were
        drawn at random without replacement from the `total` ones
    Returns an array of the same shape: the logarithm of the capital of gamblers who bet that the arch loses (as in
    Waudby-Smith and Ramdas 2020, arXiv:2006.04347). Where the arch is in fact as good as the other one on all images,
    the chance that the capital ever comes to 1 / error is at most `error`, however often one looks (Ville).

    >>> lost = evidence(np.full(60, -0.5), 1000)
    >>> int((lost < np.log(1 / 0.05)).sum())
    20
    """
    seen = np.arange(differences.shape[-1])
    before = np.cumsum(differences, -1) - differences
    # What the mean of the images that are left must at least be if the arch is to be as good in the end.
    needed = np.maximum(-before / (total - seen), -1.0)
    surprise = needed - differences
    with np.errstate(divide="ignore"):
        capital = [np.cumsum(np.log1p(bet * surprise), -1) for bet in _BETS]
    found = np.logaddexp.reduce(capital) - np.log(len(_BETS))
    return np.where(np.logical_or.accumulate(needed > 1.0, -1), np.inf, found)  # no score is above 1: it is certain
