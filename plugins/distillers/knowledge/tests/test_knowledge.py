import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.contracts import Distiller, DistillerContext, Signals
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.supernet import observe
from corenas.testing.components import spec_fragments
from corenas.testing.distillers import distiller_checks, start
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import Task, make_space, supernet
from corenas_distiller_knowledge import KL, MSE, AdaptiveAlpha, Features, SoftCrossEntropy, corenas_distillers

DISTILLERS = [
    SoftCrossEntropy(),
    SoftCrossEntropy(temperature=4.0),
    KL(),
    KL(temperature=3.0),
    MSE(),
    AdaptiveAlpha(),
    AdaptiveAlpha(alpha_min=-0.5, alpha_max=0.5, clip=10.0),
    Features(),
    Features(at=(0, "stage"), weight=0.5, answers=0.0),
]


@pytest.mark.parametrize("check", distiller_checks)
@pytest.mark.parametrize("distiller", DISTILLERS, ids=repr)
def test_conforms(distiller, check):
    check(distiller)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_distiller_knowledge")


def test_options_are_distillers_under_their_names():
    assert corenas_distillers() == {
        "soft_cross_entropy": SoftCrossEntropy, "kl": KL, "mse": MSE, "adaptive_alpha": AdaptiveAlpha,
        "features": Features,
    }  # fmt: skip
    assert all(isinstance(cls(), Distiller) for cls in corenas_distillers().values())


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(distiller, student, teacher):
    student = student.clone().requires_grad_()
    loss = start(distiller).loss(Signals(student, student), Signals(teacher, teacher))
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


# -- answers ----------------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_is_divergence_plus_entropy_of_the_teacher():
    q, p = logits(20, 7), logits(20, 7, seed=1)
    soft, kl = loss_and_gradient(SoftCrossEntropy(), q, p), loss_and_gradient(KL(), q, p)
    chances = p.softmax(1)
    entropy = -(chances * chances.log()).sum(1).mean()
    torch.testing.assert_close(soft[0], kl[0] + entropy)
    torch.testing.assert_close(soft[1], kl[1])
    torch.testing.assert_close(kl[1], (q.softmax(1) - chances) / 20)  # by hand


def test_a_sure_teacher_is_a_label():
    student, labels = logits(5, 4), torch.tensor([0, 1, 2, 3, 0])
    sure = torch.where(F.one_hot(labels, 4).bool(), 1000.0, 0.0).double()
    for distiller in (SoftCrossEntropy(), KL()):
        torch.testing.assert_close(loss_and_gradient(distiller, student, sure)[0], F.cross_entropy(student, labels))


@pytest.mark.parametrize("cls", [SoftCrossEntropy, KL])
def test_a_temperature_leaves_gradients_as_large_as_they_were(cls):
    q, p = logits(8, 10, scale=0.1), logits(8, 10, seed=1, scale=0.1)
    _, cold = loss_and_gradient(cls(1.0), q, p)
    _, hot = loss_and_gradient(cls(20.0), q, p)
    torch.testing.assert_close(hot, (q - q.mean(1, True) - p + p.mean(1, True)) / 10 / 8, rtol=0.05, atol=1e-4)
    assert cold.norm() == pytest.approx(float(hot.norm()), rel=0.2)


def divergence(q, p, alpha):
    """The alpha-divergence of one row as the paper writes it (eq. 5), in plain Python."""
    return sum(b * ((a / b) ** alpha - 1) for a, b in zip(p, q, strict=True)) / (alpha * (alpha - 1))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.5), (-2.0, -0.5), (0.3, 3.0)])
def test_the_adaptive_alpha_divergence_is_its_formula_by_hand(low, high):
    q, p = logits(6, 5), logits(6, 5, seed=1)
    rows = zip(q.softmax(1).tolist(), p.softmax(1).tolist(), strict=True)
    by_hand = [max(divergence(a, b, low), divergence(a, b, high)) for a, b in rows]
    loss, gradient = loss_and_gradient(AdaptiveAlpha(low, high, clip=1e9), q, p)
    assert float(loss) == pytest.approx(math.fsum(by_hand) / 6)
    # Nothing is cut off, so that the gradient is that of the value.
    student = q.clone().requires_grad_()
    chances, taught = student.softmax(1), p.softmax(1)
    values = [(chances * ((taught / chances) ** a - 1)).sum(1) / (a * (a - 1)) for a in (low, high)]
    (wanted,) = torch.autograd.grad(torch.maximum(*values).mean(), student)
    torch.testing.assert_close(gradient, wanted)


def test_alpha_one_is_the_kullback_leibler_divergence_and_alpha_minus_one_half_of_chi_square():
    q, p = logits(6, 5, scale=0.3), logits(6, 5, seed=1, scale=0.3)
    torch.testing.assert_close(loss_and_gradient(AdaptiveAlpha(1.0, 1.0), q, p), loss_and_gradient(KL(), q, p))
    chances, taught = q.softmax(1), p.softmax(1)
    chi_square = ((chances - taught) ** 2 / taught).sum(1).mean()
    loss, _ = loss_and_gradient(AdaptiveAlpha(-1.0, -1.0, clip=1e9), q, p)
    torch.testing.assert_close(loss, chi_square / 2)


def test_weights_are_cut_off_where_the_student_is_sure_and_the_teacher_is_not():
    q, p = torch.tensor([[8.0, 0.0, 0.0]]).double(), torch.tensor([[0.0, 8.0, 0.0]]).double()
    chances, taught = q.softmax(1)[0], p.softmax(1)[0]
    weights = (chances / taught).clamp(max=5.0)  # of alpha -1
    assert (chances / taught).max() > 1000
    loss, gradient = loss_and_gradient(AdaptiveAlpha(-1.0, -1.0), q, p)
    torch.testing.assert_close(loss, (chances * (weights - 1)).sum() / 2)
    # - sum q w grad log q / alpha, by hand
    pull = chances * weights
    torch.testing.assert_close(gradient[0], pull - chances * pull.sum())


def test_each_image_counts_by_the_larger_of_two_divergences():
    unsure, sure = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4.0, 0.0, 0.0])
    q, p = torch.stack([sure, unsure]).double(), torch.stack([unsure, sure]).double()
    alone = [[float(loss_and_gradient(AdaptiveAlpha(a, a), q[i : i + 1], p[i : i + 1])[0]) for a in (-1.0, 1.0)]
             for i in (0, 1)]  # fmt: skip
    assert alone[0][0] < alone[0][1]  # it rules out what its teacher does not: Kullback-Leibler minds
    assert alone[1][0] > alone[1][1]  # it holds possible what its teacher rules out: the negative alpha minds
    loss, _ = loss_and_gradient(AdaptiveAlpha(), q, p)
    assert float(loss) == pytest.approx((alone[0][1] + alone[1][0]) / 2)


# -- features ---------------------------------------------------------------------------------------------------------

SPACE = make_space()


def signals(model, arch, images, live):
    task = Task()
    with apply(model, arch):
        return observe(model, task, (images, None), live.taps)


def test_features_are_the_mean_squared_difference_of_named_parts():
    task = Task()
    student, teacher = supernet(SPACE, task, seed=0).eval(), supernet(SPACE, task, seed=1).eval()
    live = Features(at=("stage", -1), weight=0.25, answers=2.0).start(
        DistillerContext(task, student, torch.device("cpu"))
    )
    images = task.data["train"][0][:8]
    mine, theirs = (signals(m, SPACE.largest(), images, live) for m in (student, teacher))
    assert [f.shape for f in mine.features] == [f.shape for f in theirs.features]
    by_hand = 0.25 * sum((a - b).square().mean() for a, b in zip(mine.features, theirs.features, strict=True))
    by_hand = by_hand + 2.0 * F.cross_entropy(mine.logits, theirs.logits.softmax(1))
    torch.testing.assert_close(live.loss(mine, theirs), by_hand)


def test_a_narrower_path_is_projected_by_the_first_channels_of_a_matrix_that_learns():
    task = Task()
    model = supernet(SPACE, task)
    live = Features(at=("stage",), answers=0.0).start(DistillerContext(task, model, torch.device("cpu")))
    images = task.data["train"][0][:8]
    large, small = (signals(model, arch, images, live) for arch in (SPACE.largest(), SPACE.smallest()))
    (wide,), (narrow,) = large.features, small.features
    rows, columns = wide.shape[1], narrow.shape[1]
    assert rows > columns
    loss = live.loss(small, large)
    padded = F.pad(narrow, (0, 0, 0, 0, 0, rows - columns))  # the identity
    torch.testing.assert_close(loss, F.mse_loss(padded, wide.detach()))
    loss.backward()
    (matrix,) = live.projections
    assert matrix.grad[:, :columns].any()
    assert not matrix.grad[:, columns:].any()
    live.zero_grad(set_to_none=True)
    live.loss(signals(model, SPACE.largest(), images, live), large).backward()
    assert matrix.grad is None  # of one width nothing is projected


class Plain(nn.Module):
    """A fixed teacher with parts of its own: maps of 5 channels, half as large."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3, stride=4, padding=1), nn.ReLU())
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_a_fixed_teacher_of_another_width_and_size_has_parts_by_its_own_names():
    task = Task()
    student, teacher = supernet(SPACE.fix(dict(SPACE.largest())), task), Plain()
    options = Features(at=(-1,), teacher_at=("body.0",))
    live = options.start(DistillerContext(task, student, torch.device("cpu"), teacher))
    assert live.teacher_taps == ("body.0",)
    images = task.data["train"][0][:8]
    seen = observe(student, task, (images, None), live.taps)
    (matrix,) = live.projections
    assert matrix.shape == (5, seen.features[0].shape[1])
    taught = observe(teacher, task, (images, None), live.teacher_taps)
    assert taught.features[0].shape[2:] == (2, 2)
    live.loss(seen, taught).backward()
    assert matrix.grad.any()


def test_tokens_are_projected_along_their_last_axis():
    live = start(Features(answers=0.0))
    live.projections = nn.ParameterList([nn.init.eye_(torch.empty(6, 4))])
    mine, theirs = torch.randn(2, 10, 4), torch.randn(2, 10, 6)
    loss = live.loss(Signals(None, None, [mine]), Signals(None, None, [theirs]))
    torch.testing.assert_close(loss, F.mse_loss(F.pad(mine, (0, 2)), theirs))


@pytest.mark.parametrize(("at", "says"), [((7,), "no part 7"), (("stag",), "did you mean 'stage'")])
def test_a_part_that_there_is_not_is_named(at, says):
    with pytest.raises(UserError, match=says):
        start(Features(at=at))


@pytest.mark.parametrize("options", [SoftCrossEntropy(), KL(), AdaptiveAlpha(), Features()], ids=repr)
def test_a_task_without_logits_is_refused(options):
    live = start(options)
    nothing = Signals(None, None, [torch.zeros(1, 1)] * len(live.taps))
    with pytest.raises(UserError, match="distilled") as caught:
        live.loss(nothing, nothing)
    assert caught.value.faults[0].dotted == "distiller.type"


def test_answers_as_they_are_are_compared_by_their_squared_differences():
    live, mine, theirs = start(MSE()), logits(7, 3), logits(7, 3, seed=1)
    wanted = float(((mine - theirs) ** 2).sum()) / 21
    theirs.requires_grad_()
    assert live.loss(Signals(mine, None), Signals(theirs, None)).item() == pytest.approx(wanted)
    auxiliary = Signals((mine, mine), mine)  # several outputs, of which the logits are one
    loss = live.loss(auxiliary, Signals(theirs, theirs))
    assert loss.item() == pytest.approx(wanted)
    assert not loss.requires_grad
    nothing = Signals((mine, mine), None)
    with pytest.raises(UserError, match="distilled"):
        live.loss(nothing, nothing)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "table", "key"), [
    (SoftCrossEntropy, {"temperature": 0.0}, "temperature"),
    (AdaptiveAlpha, {"clip": 0.0}, "clip"),
    (AdaptiveAlpha, {"alpha_max": 0.0}, ""),
    (AdaptiveAlpha, {"alpha_min": 2.0}, ""),
    (Features, {"at": []}, "at"),
    (Features, {"at": [1, 2], "teacher_at": [1]}, ""),
])  # fmt: skip
def test_wrong_options_are_named(cls, table, key):
    with pytest.raises(UserError) as caught:
        structure(table, cls)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_the_readme_shows_specs_that_are_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    tables = [fragment.get("distiller") or fragment["retrain"]["distiller"] for fragment in fragments]
    options = [load_catalogue().options("distillers", table) for table in tables]
    assert options == [KL(2.0), AdaptiveAlpha(), Features(at=(-2, -1), weight=0.5)]
