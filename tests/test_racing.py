"""An arch that races is stopped where it cannot win: simulations with known accuracies, and searches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import define, field
from test_calibrate import CPU, SPACE, supernet  # noqa: F401 - a fixture
from toys import Task

from corenas.calibrate import Evaluation
from corenas.contracts import Rival, Stopped
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.racing import evidence
from corenas.search import run_search
from corenas.settings import Calibration, Racing

RUNS, IMAGES, LOOK = 1000, 600, 40
LIMIT = np.log(1 / 0.05)
FOUR_SIGMA = 4 * np.sqrt(0.05 * 0.95 / RUNS)


def scores(rng, accuracies):
    """Right or wrong: (archs, runs, images); what is hard for one arch is hard for the others as well."""
    hard = rng.normal(size=(RUNS, IMAGES))
    own = 0.6 * rng.normal(size=(len(accuracies), RUNS, IMAGES)) + hard
    return np.array([each < np.quantile(each, accuracy) for each, accuracy in zip(own, accuracies, strict=True)])


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


class Known(Task):
    """A narrow arch is right on half of the images, a wider one on nine of ten."""

    def __init__(self):
        super().__init__(valid=480)
        self.seen = 0

    def forward(self, model, batch):
        images, labels = batch
        self.seen += len(labels)
        outputs = model(images)
        if model.training or outputs.shape[1] != 3:
            return outputs
        share = {4: 0.5}.get(model.backbone.stem.elastic.choice["outputs"][0], 0.9)
        luck = (images.flatten(1).sum(1) * 1000).frac().abs()
        return F.one_hot(torch.where(luck < share, labels, (labels + 1) % 3), 3).float()


def arch_of(width):
    return SPACE.arch({**SPACE.smallest(), "width": width})


def test_who_is_far_behind_is_stopped_and_who_is_as_good_is_not(supernet):  # noqa: F811
    task = Known()
    evaluation = Evaluation(supernet, task, Calibration(batches=1, batch_size=20), CPU, batch_size=40)
    rival = Rival("top1", arch_of(8), 0.005)
    first = evaluation.raced(arch_of(8), Rival("top1", None, 0.005))
    assert first["top1"] == pytest.approx(evaluation(arch_of(8))["top1"]) == pytest.approx(90, abs=4)
    assert evaluation.raced(arch_of(6), rival) == first
    before = task.seen
    narrow = evaluation.raced(arch_of(4), rival)
    assert isinstance(narrow, Stopped)
    assert task.seen - before == 20 + narrow.extra["images"] < 20 + 240
    anew = Evaluation(supernet, task, Calibration(batches=1, batch_size=20), CPU, batch_size=40)
    assert anew.raced(arch_of(4), rival) == narrow  # which measures its rival first
    order = torch.cat([batch[1] for batch in anew._batches("valid", 40, 480, False)])
    assert not torch.equal(order, task.data["valid"][1])


def test_a_metric_that_is_no_mean_over_images_is_refused(supernet):  # noqa: F811
    class Whole(Task):
        def meter(self):
            meter = super().meter()
            meter.scores = lambda metric: None
            return meter

    evaluation = Evaluation(supernet, Whole(), Calibration(batches=0), CPU)
    with pytest.raises(UserError, match="cannot be raced by"):
        evaluation.raced(arch_of(4), Rival("top1", None, 0.05))


@define
class Runner:
    """Notes whom archs race against."""

    rivals: list = field(factory=list)
    rival: Rival | None = None
    batch: int = 1

    def __call__(self, trials):
        self.rivals.append(self.rival)
        return [Trial(t.arch, {"top1": float(t.arch["depth"])}, fidelity=t.fidelity) for t in trials]


class Listed:
    def __init__(self, archs):
        self.archs = archs

    def ask(self, n):
        return self.archs[:n]

    def tell(self, trials):
        del self.archs[: len(trials)]

    def state_dict(self):
        return {}


def test_archs_race_against_the_last_of_the_best_that_the_searcher_was_told_of():
    archs = [*{SPACE.sample(np.random.default_rng(i)): None for i in range(40)}][:12]
    runner, objectives = Runner(), Objectives((Objective("top1"),))
    racing = Racing(confidence=0.9, best=4)
    trials = run_search(Listed([*archs]), runner, 12, batch=3, objectives=objectives, racing=racing)
    assert [rival.error for rival in runner.rivals] == pytest.approx([0.025] * 12)
    for at, rival in enumerate(runner.rivals):
        told = trials[: at // 3 * 3]
        assert rival.arch == (objectives.best(told, 4)[-1].arch if len(told) > 3 else None)
