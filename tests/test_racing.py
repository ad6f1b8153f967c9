"""An arch that races is stopped where it cannot win: simulations with known accuracies, and the error that is allowed."""

import numpy as np
import pytest

from corenas.racing import evidence

RUNS, IMAGES, LOOK = 1000, 600, 40
LIMIT = np.log(1 / 0.05)
FOUR_SIGMA = 4 * np.sqrt(0.05 * 0.95 / RUNS)


def scores(rng, accuracies):
    """Right or wrong: (archs, runs, images); what is hard for one arch is hard for the others as well."""
    hard = rng.normal(size=(RUNS, IMAGES))
    own = 0.6 * rng.normal(size=(len(accuracies), RUNS, IMAGES)) + hard
    return own < np.quantile(own, accuracies[0]) + (np.array(accuracies) - accuracies[0])[:, None, None] * 4


def looked_at(found):
    """Where a look after every 40 images, which is a batch, finds enough evidence."""
    return found[..., LOOK - 1 :: LOOK] >= LIMIT


@pytest.mark.parametrize("accuracies", [(0.9, 0.9, 0.9, 0.9), (0.8, 0.79, 0.78, 0.7, 0.6), (0.5, 0.52, 0.54, 0.56)])
def test_the_winner_changes_no_more_often_than_is_said(accuracies):
    right = scores(np.random.default_rng(0), accuracies)
    totals = right.sum(-1)
    best, best_total, spared = right[0], totals[0], 0.0
    for own, total in zip(right[1:], totals[1:], strict=True):  # each against the best that was measured to the end
        stops = looked_at(evidence(own.astype(float) - best, IMAGES))
        spared += float(np.where(stops.any(-1), 1 - (stops.argmax(-1) + 1) * LOOK / IMAGES, 0).mean())
        better = ~stops.any(-1) & (total > best_total)
        best = np.where(better[:, None], own, best)
        best_total = np.where(better, total, best_total)
    lost = (best_total < totals.max(0)).mean()
    assert lost <= 0.05
    if accuracies[-1] == 0.6:
        assert spared > 1.2  # of the four that race, more than one need not be measured


def test_a_tie_is_taken_for_a_loss_as_rarely_as_is_said():
    rng = np.random.default_rng(1)
    for share in (0.1, 0.5, 1.0):
        half = int(IMAGES * share) // 2
        tie = np.repeat([1.0, -1.0, 0.0], [half, half, IMAGES - 2 * half])
        assert tie.sum() == 0
        differences = rng.permuted(np.tile(tie, (RUNS, 1)), axis=1)
        found = evidence(differences, IMAGES)
        assert (found.max(1) >= LIMIT).mean() <= 0.05 + FOUR_SIGMA  # a look at every image


def test_what_is_certain_is_evidence_enough():
    behind = evidence(np.repeat([-1.0, 1.0], [6, 4]), 10)
    assert np.isinf(behind[6:]).all()  # six behind, four left
    assert not np.isinf(behind[:5]).any()
    ahead = evidence(np.repeat([1.0, -1.0], [9, 1]), 10)
    assert (ahead <= 0).all()
