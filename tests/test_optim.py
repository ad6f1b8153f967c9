"""Optimizers and schedules: what torch's own classes take, and the learning rates that formulas and torch give."""

import inspect
import math
import subprocess
import sys

import attrs
import pytest
import torch
from torch import nn

from corenas import optim
from corenas.errors import UserError
from corenas.optim import Schedule
from corenas.options import structure
from corenas.settings import Train


def defaults(files):
    """Of each class its arguments with their defaults."""
    return {name: {f.name: f.default for f in attrs.fields(optim.options(name, files[name]))} for name in files}


OPTIMIZERS, SCHEDULES = defaults(optim.optimizers()), defaults(optim.schedules())


def parameters(cls):
    return [*inspect.signature(cls).parameters.values()][1:]  # after the parameters or the optimizer


@pytest.mark.parametrize(("name", "found", "module"), [
    *((name, found, torch.optim) for name, found in OPTIMIZERS.items()),
    *((name, found, torch.optim.lr_scheduler) for name, found in SCHEDULES.items()),
])  # fmt: skip
def test_the_source_text_has_the_arguments_that_torch_takes(name, found, module):
    theirs = parameters(getattr(module, name))
    assert [*found] == [p.name for p in theirs]
    for p in theirs:
        required = p.default is p.empty
        assert (found[p.name] is attrs.NOTHING) == required
        if isinstance(p.default, bool | int | float | tuple | str):
            assert found[p.name] == p.default or (found[p.name] is None and p.default == 1 / 3)  # written as 1.0 / 3


def test_all_that_a_plain_loop_can_drive_are_known():
    theirs = {name for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    assert theirs - OPTIMIZERS.keys() <= {"LBFGS", "SparseAdam", "Optimizer", "Muon"}
    assert {"SGD", "Adam", "AdamW", "RMSprop"} <= OPTIMIZERS.keys()
    assert {"StepLR", "MultiStepLR", "CosineAnnealingLR", "PolynomialLR", "LinearLR"} <= SCHEDULES.keys()


def test_reading_them_imports_no_torch():
    code = "import sys; from corenas import optim; assert optim.optimizers(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def faults(table):
    with pytest.raises(UserError) as caught:
        structure(table, Train)
    return [f.dotted for f in caught.value.faults]


def test_without_a_type_the_default_is_changed():
    assert train().optimizer == {"type": "SGD", "lr": 0.1, "momentum": 0.9}
    assert train(optimizer={"lr": 0.2}).optimizer == {"type": "SGD", "lr": 0.2, "momentum": 0.9}
    assert train(optimizer={"type": "Adam"}).optimizer == {"type": "Adam"}
    assert faults({"optimizer": {"lr": "0.1"}}) == ["optimizer.lr"]


def test_mistakes_in_an_optimizer_are_told_by_key():
    assert faults({"optimizer": {"type": 3, "lr": 0.1}}) == ["optimizer.type"]
    assert faults({"optimizer": {"type": "Sdg", "lr": 0.1}}) == ["optimizer.type"]
    assert faults({"optimizer": {"type": "SGD", "lr": "0.1", "momentun": 0.9, "nesterov": 1}}) == [
        "optimizer.lr", "optimizer.momentun", "optimizer.nesterov"]  # fmt: skip
    assert faults({"optimizer": {"type": "SGD", "lr": -1, "momentum": math.inf}}) == [
        "optimizer.lr",
        "optimizer.momentum",
    ]
    assert faults({"optimizer": {"type": "Adam", "betas": [0.9, "x"]}}) == ["optimizer.betas[1]"]
    assert faults({"optimizer": {"type": "Adam", "betas": [0.9]}}) == ["optimizer.betas"]
    assert faults({"optimizer": {"type": "LBFGS"}}) == ["optimizer.type"]


@pytest.mark.parametrize(("name", "option", "place"), [
    ("Adam", {"betas": [0.9, 1.0]}, "betas[1]"), ("AdamW", {"betas": [-0.1, 0.9]}, "betas[0]"),
    ("Adadelta", {"rho": 1.5}, "rho"), ("RMSprop", {"alpha": -1}, "alpha"),
    ("NAdam", {"betas": [0.9, math.nan]}, "betas[1]"),
])  # fmt: skip
def test_an_average_that_forgets_nothing_or_more_than_all_is_a_mistake(name, option, place):
    assert faults({"optimizer": {"type": name, "lr": 0.1, **option}}) == [f"optimizer.{place}"]


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2", [2]])
def test_epochs_of_a_schedule_are_counted_from_1(number):
    for name, key in (("StepLR", "step_size"), ("CosineAnnealingWarmRestarts", "T_0"), ("PolynomialLR", "total_iters")):
        found = faults({"schedule": {"type": name, "options": {key: number}}})
        assert found == [f"schedule.options.{key}"]


def test_a_name_stands_for_a_schedule():
    assert structure({"schedule": "constant"}, Train) == Train(schedule=optim.Schedule("constant"))
    assert faults({"schedule": "cosin"}) == ["schedule.type"]
    with pytest.raises(UserError, match="schedule: expected a table or its type, found 3"):
        structure({"schedule": 3}, Train)


def test_mistakes_in_a_schedule_are_told_by_key():
    assert faults({"schedule": {"type": "cosin"}}) == ["schedule.type"]
    assert faults({"schedule": {"type": "cosine", "options": {"T_max": 3}}}) == ["schedule.options"]
    assert faults({"schedule": {"type": "StepLR"}}) == ["schedule.options.step_size"]
    assert faults({"schedule": {"type": "StepLR", "options": {"step_size": 2, "gama": 1}}}) == ["schedule.options.gama"]
    assert faults({"schedule": {"type": "OneCycleLR", "options": {"max_lr": 1}}}) == ["schedule.type"]


def train(**table):
    return structure(table, Train)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.ln, self.gn = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.LayerNorm(4),
            nn.GroupNorm(2, 4),
        )
        self.rms, self.first, self.second = nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def groups(no_decay):
    model = Tied()
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = train(optimizer={"type": "SGD", "lr": 0.1, "weight_decay": 0.5}, no_decay=no_decay)
    found = optim.build_optimizer(model, settings.optimizer, settings.no_decay).param_groups
    return {group["weight_decay"]: {names[p] for p in group["params"]} for group in found}


def test_norms_and_biases_have_no_weight_decay_where_the_settings_say_so():
    weights, norms = {"conv.weight", "first.weight"}, {"bn.weight", "ln.weight", "gn.weight", "rms.weight"}
    norm_biases, biases = {"bn.bias", "ln.bias", "gn.bias"}, {"conv.bias", "first.bias", "second.bias"}
    assert groups(["norm", "bias"]) == {0.5: weights, 0.0: norms | norm_biases | biases}
    assert groups(["norm"]) == {0.5: weights | biases, 0.0: norms | norm_biases}
    assert groups(["bias"]) == {0.5: weights | norms, 0.0: norm_biases | biases}
    assert groups([]) == {0.5: weights | norms | norm_biases | biases}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps(name):
    model = nn.Linear(3, 2)
    optimizer = optim.build_optimizer(model, {"type": name, "lr": 0.1})
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_what_torch_refuses_is_a_mistake_of_the_spec():
    table = {"type": "SGD", "lr": 0.1, "nesterov": True}
    with pytest.raises(UserError, match=r"train.optimizer: .*[Nn]esterov"):
        optim.build_optimizer(nn.Linear(1, 1), table)
    for name, option in (("AdamW", "capturable"), ("RMSprop", "capturable"), ("SGD", "differentiable")):
        with pytest.raises(UserError, match=r"train.optimizer: torch refuses this"):
            optim.build_optimizer(nn.Linear(1, 1), {"type": name, "lr": 0.1, option: True})
    wrong = Schedule("LinearLR", options={"start_factor": 2})
    with pytest.raises(UserError, match=r"train.schedule"):
        rates(wrong, 3, 2)


def rates(schedule, epochs, steps, lr=0.4):
    """The learning rate of every step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    live = optim.build_schedule(optimizer, schedule, epochs, steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        live.step()
    return found


def test_cosine_is_torchs_cosine():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    theirs, wanted = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.04), []
    for _ in range(20):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(Schedule("cosine", floor=0.1), 4, 5) == pytest.approx(wanted, rel=1e-9)


def test_linear_is_torchs_linear_step_by_step():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    theirs, wanted = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20), []
    for _ in range(20):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(Schedule("linear", floor=0.1), 4, 5) == pytest.approx(wanted, rel=1e-9)


def test_a_warm_up_grows_linearly_and_the_rest_goes_on_behind_it():
    found = rates(Schedule("cosine", warmup=1.5), 4, 4)
    assert found[:7] == pytest.approx([0.4 * (i + 1) / 7 for i in range(7)])
    assert found[6:] == pytest.approx([0.2 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    assert rates(Schedule("constant", warmup=1), 2, 3) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_exponential_falls_every_so_many_epochs_down_to_its_floor():
    found = rates(Schedule("exponential", decay=0.5, every=1.5, floor=0.2), 6, 4, lr=1.0)
    assert found == pytest.approx([max(0.2, 0.5 ** (i // 6)) for i in range(24)])
    found = rates(Schedule("exponential", decay=0.5, every=0.1), 1, 30, lr=1.0)
    assert found == pytest.approx([0.5 ** (i // 3) for i in range(30)])


@pytest.mark.parametrize(("name", "options"), [
    ("StepLR", {"step_size": 2}), ("MultiStepLR", {"milestones": [1, 4]}), ("PolynomialLR", {"total_iters": 5}),
    ("CosineAnnealingLR", {"T_max": 6, "eta_min": 0.1}), ("CosineAnnealingWarmRestarts", {"T_0": 2, "eta_min": 0.05}),
    ("LinearLR", {}), ("ConstantLR", {}), ("ExponentialLR", {"gamma": 0.8}),
])  # fmt: skip
def test_torchs_classes_step_once_an_epoch(name, options):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    theirs, wanted = getattr(torch.optim.lr_scheduler, name)(optimizer, **options), []
    for _ in range(6):
        wanted += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        theirs.step()
    assert rates(Schedule(name, options=options), 6, 3) == pytest.approx(wanted)
    assert rates(Schedule(name, warmup=1, options=options), 6, 3) == pytest.approx(
        [rate * min(1, (i + 1) / 4) for i, rate in enumerate(wanted)])  # fmt: skip


@pytest.mark.parametrize("kind", ["cosine", "StepLR"])
def test_a_training_of_no_epochs_has_a_schedule(kind):
    assert rates(Schedule(kind, options={"step_size": 1} if kind == "StepLR" else {}), 0, 3) == []
