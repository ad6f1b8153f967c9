"""The conformance checks: components that keep their promises pass them, those that break one are found out."""

import importlib
import itertools
import json
import random
import sys
import time
import types
import typing
from concurrent import futures
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from torch import nn

from corenas import contracts, plugins
from corenas.contracts import Failure, Metric, Phase, Progress, Proposal, RunDone, TrialDone
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.mutable import Elastic, apply
from corenas.objectives import Trial
from corenas.space import Arch, unseen
from corenas.teaching import distil_in_place, refuse_unless_largest_first
from corenas.testing import (
    algorithms,
    backbones,
    commands,
    distillers,
    distributions,
    evaluators,
    executors,
    exporters,
    listeners,
    mutables,
    mutators,
    searchers,
    small,
    tasks,
)
from corenas.testing.components import imports_no_torch
from corenas.value import Dimension
from corenas.variables import Variable


def fails(check, *given, **more):
    """A component that breaks a promise is told so, by an assertion and not by an accident."""
    with pytest.raises(AssertionError):
        check(*given, **more)


# -- all kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*plugins.KINDS, "mutables", "listeners", "distributions"])
def test_every_kind_has_checks_that_say_what_they_promise(kind):
    module = importlib.import_module(f"corenas.testing.{kind}")
    checks = getattr(module, f"{kind[:-1]}_checks")
    assert len(checks) >= 4
    assert all(check.__doc__ for check in checks)
    assert len({check.__name__ for check in checks}) == len(checks)


@pytest.mark.parametrize("kind", ["searchers", "mutators", "executors", "commands", "listeners", "distributions"])
def test_checks_that_need_no_torch_do_not_import_it(kind):
    imports_no_torch(f"corenas.testing.{kind}")


# -- searchers --------------------------------------------------------------------------------------------------------


@frozen
class Halving:
    """Successive halving: nine archs are measured a little, the best of them more.

    keeps: how many of a rung go on
    """

    keeps: int = 3

    def start(self, problem, rng):
        return LiveHalving(self.keeps, problem, rng)


class LiveHalving:
    def __init__(self, keeps, problem, rng):
        self.keeps, self.problem, self.rng = keeps, problem, rng
        self.rung, self.told, self.fidelity, self.seen = [], [], 1.0, set()

    def ask(self, n):
        if not self.rung:
            best = self.problem.objectives.best(self.told, self.keeps) if self.fidelity < 1 else []
            self.fidelity, self.told = 1.0 if best else 1 / 9, []
            self.rung = [trial.arch for trial in best] or self.fresh()
        asked, self.rung = self.rung[:n], self.rung[n:]
        return [Proposal(arch, self.fidelity) for arch in asked]

    def fresh(self):
        new = {}
        for _ in range(60):
            arch = self.problem.space.sample(self.rng)
            if arch not in self.seen and len(new) < 9:
                new[arch] = None
        self.seen |= new.keys()
        return [*new]

    def tell(self, trials):
        self.told = [*self.told, *(trial for trial in trials if trial.ok)]

    def state_dict(self):
        return {"rung": [*map(dict, self.rung)], "told": [t.to_json() for t in self.told], "fidelity": self.fidelity,
                "seen": [*map(dict, self.seen)], "rng": self.rng.bit_generator.state}  # fmt: skip

    def load_state_dict(self, state):
        self.rung, self.seen = [*map(Arch, state["rung"])], {*map(Arch, state["seen"])}
        self.told, self.fidelity = [*map(Trial.from_json, state["told"])], state["fidelity"]
        self.rng.bit_generator.state = state["rng"]


@pytest.mark.parametrize("check", searchers.searcher_checks)
def test_a_searcher_may_propose_shares_of_the_whole_effort(check):
    check(Halving())


def test_a_searcher_that_proposes_nonsense_is_found_out():
    class Nothing(LiveHalving):
        def ask(self, n):
            return [evolve(proposal, fidelity=0.0) for proposal in super().ask(n)]

    class Twice(LiveHalving):
        def ask(self, n):
            return [*super().ask(n)[:1]] * 2

    for live, check in ((Nothing, searchers.asks_only_archs_of_its_space), (Twice, searchers.asks_each_arch_once)):
        fails(check, types.SimpleNamespace(start=lambda problem, rng, live=live: live(3, problem, rng)))


@frozen
class Hill:
    """Draws at random, then mutates the best so far.

    sign: -1 where it takes the least for the best
    spoils: whether it changes what it is told
    """

    sign: int = 1
    spoils: bool = False

    def start(self, problem, rng):
        return LiveHill(self, problem, rng)


class LiveHill:
    def __init__(self, options, problem, rng):
        self.options, self.problem, self.rng, self.seen, self.best = options, problem, rng, set(), []

    def ask(self, n):
        space = self.problem.space
        draw = (lambda: space.mutate(self.best[0].arch, 0.2, self.rng)) if self.best else lambda: space.sample(self.rng)
        return unseen(draw, n, self.seen)

    def tell(self, trials):
        self.best = sorted([*self.best, *trials], key=lambda trial: -self.options.sign * trial.metrics["gain"])[:1]
        if self.options.spoils:
            trials[0].metrics["gain"] = 0.0


def test_a_searcher_that_mistakes_the_least_for_the_best_or_changes_its_trials_is_found_out():
    for sign in (1, -1):
        fails(searchers.finds_better_archs_than_random_draws, Hill(sign))
    fails(searchers.asks_each_arch_once, Hill(spoils=True))
    searchers.asks_each_arch_once(Hill())


# -- mutators ---------------------------------------------------------------------------------------------------------


@frozen
class Pairs:
    """Draws two archs a step.

    draw: of context -> an arch
    """

    draw: typing.Any = lambda context: context.space.sample(context.rng)

    def start(self, context):
        return types.SimpleNamespace(sample=lambda score: [self.draw(context) for _ in range(context.paths or 2)])


@pytest.mark.parametrize("check", mutators.mutator_checks)
def test_a_mutator_that_keeps_its_promises_passes(check):
    check(Pairs())


def never_the_last_choice(context):
    counts = [max(1, len(variable.choices) - 1) for variable in context.space.variables]
    return context.space.decode(context.space.canonical(context.rng.integers(0, [counts])))[0]


def always_seeded_anew(context):
    return context.space.sample(np.random.default_rng(42))


@pytest.mark.parametrize("draw", [never_the_last_choice, always_seeded_anew])
def test_a_mutator_that_never_draws_some_choices_is_found_out(draw):
    fails(mutators.draws_every_choice, Pairs(draw))


# -- evaluators -------------------------------------------------------------------------------------------------------


@frozen
class Output:
    """How large the output of a fresh network is, and the top1 of the supernet.

    alone: whether it trains the arch from scratch instead
    """

    alone: bool = False
    cheap: ClassVar = False

    def provides(self, task):
        return {"size": Metric(), "top1": Metric("%")}

    def measure(self, where, archs, fidelity):
        return [self.one(where, arch, fidelity) for arch in archs]

    def one(self, where, arch, fidelity):
        if arch["op"] == "pool":
            return Failure("no pooling here")
        network = where.alone(arch, fidelity) if self.alone else where.subnet(arch)
        with torch.no_grad(), apply(network, arch):
            size = float(network.eval()(torch.randn(4, *where.task.example.shape[1:])).norm())
        top1 = where.evaluation(arch, "valid", fidelity)["top1"] if where.evaluation else 0.0
        return {"size": size, "top1": top1}

    def start(self, where):
        return lambda archs, fidelity: self.measure(where, archs, fidelity)


@pytest.mark.parametrize("check", evaluators.evaluator_checks)
@pytest.mark.parametrize("alone", [False, True])
def test_an_evaluator_that_keeps_its_promises_passes(alone, check):
    check(Output(alone))


class Ranks(Output):
    def measure(self, where, archs, fidelity):
        return [{"size": float(i), "top1": 0.0} for i, _ in enumerate(archs)]


class Leaves(Output):
    def one(self, where, arch, fidelity):
        apply(where.supernet.eval(), arch)
        return super().one(where, arch, fidelity)


class Numpys(Output):
    def one(self, where, arch, fidelity):
        return {"size": np.random.rand(), "top1": 0.0}


class Peeking(Output):
    def one(self, where, arch, fidelity):
        return {"size": 0.0, **where.evaluation(arch, "test")}


class Lacks(Output):
    def one(self, where, arch, fidelity):
        return {"size": 1.0}


class Cached(Output):
    def start(self, where):
        found = {}

        def measure(archs, fidelity):
            return [found.setdefault(arch, self.one(where, arch, fidelity)) for arch in archs]

        return measure


class Switching(Output):
    def one(self, where, arch, fidelity):
        torch.set_grad_enabled(False)
        return super().one(where, arch, fidelity)


class Infinite(Output):
    def one(self, where, arch, fidelity):
        return {"size": float("inf"), "top1": 0.0}


class Flops(Output):
    def provides(self, task):
        return {"flops": Metric()}


class Perhaps(Output):
    cheap: ClassVar = "perhaps"


@pytest.mark.parametrize(("wrong", "check"), [
    (Ranks, evaluators.measures_the_same_in_any_order_and_grouping),
    (Numpys, evaluators.measures_the_same_in_any_order_and_grouping),
    (Numpys, evaluators.touches_no_global_generator),
    (Cached, evaluators.measures_the_same_in_any_order_and_grouping),
    (Leaves, evaluators.leaves_the_supernet_as_it_was),
    (Switching, evaluators.leaves_the_supernet_as_it_was),
    (Peeking, evaluators.never_reads_test_data),
    (Lacks, evaluators.gives_exactly_what_it_promises),
    (Infinite, evaluators.gives_exactly_what_it_promises),
    (Perhaps, evaluators.says_whether_it_is_cheap),
    (Flops, evaluators.promises_its_metrics_before_any_data_is_read),
], ids=lambda part: part.__name__)  # fmt: skip
def test_an_evaluator_that_breaks_a_promise_is_found_out(wrong, check):
    with torch.enable_grad():  # and as before afterwards
        fails(check, wrong())


# -- algorithms -------------------------------------------------------------------------------------------------------


@frozen
class Labels:
    """Trains on the labels.

    live: class of its trainer
    """

    live: type = small.Trainer
    stages: ClassVar = ("train", "search")
    needs: ClassVar = ("mutator", "searcher")

    def start(self, context):
        trainer = self.live(context.supernet, context.task, [(context.space, context.train)])
        trainer.space = context.space
        return trainer


class InPlace(small.Trainer):
    def train_step(self, batch, step):
        return distil_in_place(self.model, self.task, self.distiller, batch, step, self.space.largest())


@frozen
class Silent(Labels):
    """Trains on the labels, and on what the largest says, and does not say before that the largest has to be first.

    live: class of its trainer
    """

    live: type = InPlace
    needs: ClassVar = ("mutator", "searcher", "distiller")

    def start(self, context):
        trainer = super().start(context)
        trainer.distiller = context.distiller
        return trainer


@frozen
class Distils(Silent):
    """The same, and says so.

    live: class of its trainer
    """

    def check_archs(self, archs, space):
        refuse_unless_largest_first(archs, space.largest())


@pytest.mark.parametrize("check", algorithms.algorithm_checks)
@pytest.mark.parametrize("options", [Labels(), Distils()], ids=["labels", "distils"])
def test_an_algorithm_that_keeps_its_promises_passes(options, check):
    check(options)


def lent(step, **changes):
    names = ("archs", "optimizer", "lr", "index", "part", "rng", "more", "mean", "backward")
    return types.SimpleNamespace(**{name: getattr(step, name) for name in names} | changes)


class OnlyFirst(small.Trainer):
    def train_step(self, batch, step):
        return super().train_step(batch, lent(step, archs=step.archs[:1]))


class OutsideOfTheWith(small.Trainer):
    """Runs what it trains after its arch is in force no more."""

    def train_step(self, batch, step):
        for arch in step.archs:
            with apply(self.model, arch):
                pass
            loss = step.backward(self.task.loss(self.task.forward(self.model, batch), batch))
        return {"loss": loss}


class InEvaluation(small.Trainer):
    def train_step(self, batch, step):
        self.model.eval()
        figures = super().train_step(batch, step)
        self.model.train()
        return figures


class EndsWithTheLargest(small.Trainer):
    def train_step(self, batch, step):
        figures = super().train_step(batch, step)
        apply(self.model, self.space.largest())
        return figures


class Steps(small.Trainer):
    def train_step(self, batch, step):
        figures = super().train_step(batch, step)
        step.optimizer.step()
        return figures


class Clears(small.Trainer):
    def train_step(self, batch, step):
        step.optimizer.zero_grad()
        return super().train_step(batch, step)


class Derives(small.Trainer):
    def derive(self):
        apply(self.model, self.space.smallest())
        return self.space.smallest()


class AlwaysLargest(small.Trainer):
    def train_step(self, batch, step):
        return super().train_step(batch, lent(step, archs=[self.space.largest()]))


class Attached(small.Trainer):
    def train_step(self, batch, step):
        return {"loss": super().train_step(batch, step)["loss"] * torch.ones(1, requires_grad=True)}


class Forgets(small.Trainer):
    """Its loss hangs on a count that is in no state."""

    count = 0

    def train_step(self, batch, step):
        self.count += 1
        backward = lambda loss: step.backward(loss * (1 + 0.1 * self.count))  # noqa: E731
        return super().train_step(batch, lent(step, backward=backward))


class Evaluates(small.Trainer):
    def train_step(self, batch, step):
        self.model.backbone.stem.eval()
        return super().train_step(batch, step)


class Idle(small.Trainer):
    def train_step(self, batch, step):
        with apply(self.model, step.archs[0]):
            loss = self.task.loss(self.task.forward(self.model, batch), batch)
        return {"loss": step.backward(0 * loss)}


class Peeks(small.Trainer):
    def train_step(self, batch, step):
        self.task.dataset("test", False)
        return super().train_step(batch, step)


class Elsewhere(small.Trainer):
    def __init__(self, model, task, phases):
        super().__init__(model, task, phases)
        self.phases = [Phase(small.make_space(width=[4, 6, 8, 10]), self.phases[0].train)]


class Pythons(small.Trainer):
    def train_step(self, batch, step):
        random.random()
        return super().train_step(batch, step)


@pytest.mark.parametrize(("live", "check"), [
    (AlwaysLargest, algorithms.trains_only_what_its_archs_use),
    (OnlyFirst, algorithms.trains_each_arch_that_is_drawn),
    (OutsideOfTheWith, algorithms.trains_each_arch_that_is_drawn),
    (InEvaluation, algorithms.trains_each_arch_that_is_drawn),
    (EndsWithTheLargest, algorithms.leaves_the_network_as_it_was_but_for_gradients),
    (Steps, algorithms.leaves_the_network_as_it_was_but_for_gradients),
    (Clears, algorithms.leaves_the_network_as_it_was_but_for_gradients),
    (Attached, algorithms.gives_figures_that_are_finite_and_detached),
    (Forgets, algorithms.killed_and_resumed_ends_with_the_same_bits),
    (Evaluates, algorithms.leaves_the_network_as_it_was_but_for_gradients),
    (Idle, algorithms.learns_in_anyones_loop),
    (Peeks, algorithms.never_reads_test_data),
    (Elsewhere, algorithms.has_phases_within_its_space),
    (Pythons, algorithms.touches_no_global_generator),
], ids=lambda part: part.__name__)  # fmt: skip
def test_an_algorithm_that_breaks_a_promise_is_found_out(live, check):
    mutator = small.Paths(1) if live is AlwaysLargest else small.Paths()
    fails(check, Labels(live), mutator=mutator)


def test_an_algorithm_that_leaves_an_arch_in_force_as_it_derives_is_found_out():
    options = Labels(Derives)
    deriving = types.SimpleNamespace(stages=("train", "derive"), needs=("mutator",), start=options.start)
    fails(algorithms.derives_where_it_says_so, deriving)


@frozen
class Particular(Labels):
    """Wants weights to look at, before there are any.

    live: class of its trainer
    """

    def check(self, context):
        if next(context.supernet.parameters()).is_meta:
            raise UserError("this network has no weights", key=("backbone",))


def test_an_algorithm_that_checks_weights_where_there_are_none_is_found_out():
    fails(algorithms.checks_a_network_that_has_no_weights, Particular())


def test_an_algorithm_that_refuses_archs_only_as_it_trains_is_found_out():
    fails(algorithms.refuses_archs_before_a_run_as_in_a_step, Silent())


@pytest.mark.parametrize(("stages", "needs"), [
    (("search", "train"), ("searcher",)), (("train", "fly"), ()), ((), ()), (("train",), ("teacher",)),
    (("train", "search"), ("mutator",)),
])  # fmt: skip
def test_stages_and_needs_that_there_are_not_are_found_out(stages, needs):
    fails(algorithms.names_stages_and_needs_that_there_are, types.SimpleNamespace(stages=stages, needs=needs))


# -- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", backbones.backbone_checks)
def test_a_backbone_that_keeps_its_promises_passes(check):
    check(small.Backbone(), small.make_space(), image=(1, 8, 8))


class Wrong(small.Backbone):
    def __init__(self, change):
        super().__init__()
        object.__setattr__(self, "change", change)

    def build(self, space):
        body = super().build(space)
        self.change(body)
        return body


def of_other_dimensions(body):
    body.feat_dims = [Dimension.of(8)]


def with_images_mixed(body):
    class Mixed(type(body.stem)):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    body.stem.__class__ = Mixed


def normalising_in_place(body):
    class Normalising(type(body.stem)):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    body.stem.__class__ = Normalising


def with_idle_weights(body):
    body.idle = nn.Linear(2, 2)


def drawn_by_numpy(body):
    body.stem.weight.data *= np.random.rand()


def with_a_cheap_width(body):
    width = body.stem.elastic.values["outputs"].parts[0]
    body.stem.cost = lambda positions: small.conv_cost(1, width * -100 + 2000, 9, positions, 1, True)


def with_a_wrong_cost(body):
    body.stem.cost = lambda positions: small.conv_cost(1, body.feat_dims[0].size, 8, positions, 1, True)


def with_segments_of_its_own(body):
    body.segments = [body.stage, body.stem]


def allocated_in_memory(body):
    body.stem.weight = nn.Parameter(torch.randn(body.stem.weight.shape, device="cpu"))


def touching_all_weights(body):
    for layer in [module for module in body.modules() if isinstance(module, nn.Conv2d)]:

        class Touching(type(layer)):
            def forward(self, x):
                whole = self.weight.sum()
                return super().forward(x) + (whole - whole.detach())

        layer.__class__ = Touching


@pytest.mark.parametrize(("change", "check"), [
    (of_other_dimensions, backbones.gives_the_features_that_it_states),
    (with_images_mixed, backbones.gives_the_features_that_it_states),
    (normalising_in_place, backbones.gives_the_features_that_it_states),
    (with_idle_weights, backbones.has_no_weight_that_no_arch_uses),
    (drawn_by_numpy, backbones.draws_its_weights_from_torchs_generator),
    (with_a_cheap_width, backbones.more_of_a_variable_never_costs_less),
    (with_a_wrong_cost, backbones.costs_what_its_exported_networks_cost),
    (with_segments_of_its_own, backbones.runs_its_segments_in_order),
    (allocated_in_memory, backbones.builds_on_the_meta_device_and_costs_the_same_there),
    (touching_all_weights, backbones.trains_exactly_what_an_arch_uses),
], ids=lambda part: part.__name__)  # fmt: skip
def test_a_backbone_that_breaks_a_promise_is_found_out(change, check):
    fails(check, Wrong(change), small.make_space(), image=(1, 8, 8))


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", tasks.task_checks)
def test_a_task_that_keeps_its_promises_passes(check):
    check(small.Patterns())


class Broken(small.Task):
    """Has a change, which is a function of itself."""

    def __init__(self, change, rng, data):
        super().__init__()
        self.splits = self.splits if data else {}
        change(self, rng)


def of_wrong_sizes(task, rng):
    task.splits = {name: size + 1 for name, size in task.splits.items()}


def leaking(task, rng):
    task.data["valid"] = task.data["train"][0][:48], task.data["train"][1][:48]


def drawn_anew(task, rng):
    task.data = {name: (x + 0.1 * torch.randn(x.shape), y) for name, (x, y) in task.data.items()}


def augmenting_test(task, rng):
    task.dataset = lambda split, augmented: small.Data(*task.data[split], augmented)


def of_batch_means(task, rng):
    class Mean(small.Meter):
        def update(self, outputs, batch):
            self.right = float((outputs.argmax(1) == batch[1]).float().mean())
            self.seen = 1

    task.meter = Mean


def normalising_what_it_keeps(task, rng):
    class Normalising(small.Data):
        def __getitem__(self, i):
            return self.images[i].sub_(0.1).div_(1.3), self.labels[i]

    task.dataset = lambda split, augmented: Normalising(*task.data[split], False)


def with_one_meter_for_all(task, rng):
    class Shared(small.Meter):
        each: ClassVar = []

        def __init__(self):
            pass

        def update(self, outputs, batch):
            self.each.append(outputs.argmax(1) == batch[1])

        def compute(self):
            return {"top1": 100 * float(torch.cat(self.each).float().mean())}

    task.meter = Shared


def of_sums(task, rng):
    task.loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1], reduction="sum")


def of_another_size(task, rng):
    task.example = torch.zeros(1, 1, 16, 16)


def with_another_metric(task, rng):
    task.metrics = {"top5": Metric()}


def of_vectors(task, rng):
    task.loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")


def detached(task, rng):
    task.forward = lambda model, batch: model.head([f.detach() for f in model.backbone.features(batch[0])])


def of_lambdas(task, rng):
    task.dataset = lambda split, augmented: [(lambda x=x, y=y: (x, y), y) for x, y in zip(*task.data[split])]  # noqa: B905


def reading(task, rng):
    with open(__file__):
        pass


@pytest.mark.parametrize(("change", "check"), [
    (of_wrong_sizes, tasks.has_splits_of_the_sizes_that_it_says),
    (leaking, tasks.keeps_its_splits_apart),
    (drawn_anew, tasks.cuts_the_same_splits_from_the_same_generator),
    (augmenting_test, tasks.augments_by_torchs_generator_and_never_test),
    (normalising_what_it_keeps, tasks.augments_by_torchs_generator_and_never_test),
    (of_batch_means, tasks.measures_what_its_metrics_say),
    (with_one_meter_for_all, tasks.measures_what_its_metrics_say),
    (of_sums, tasks.its_loss_is_a_mean_over_samples),
    (of_another_size, tasks.has_a_loss_to_train_by),
    (with_another_metric, tasks.measures_what_its_metrics_say),
    (of_vectors, tasks.has_a_loss_to_train_by),
    (detached, tasks.has_a_loss_to_train_by),
    (reading, tasks.knows_its_shapes_and_metrics_without_data),
], ids=lambda part: part.__name__)  # fmt: skip
def test_a_task_that_breaks_a_promise_is_found_out(change, check):
    fails(check, types.SimpleNamespace(start=lambda rng, data=True: Broken(change, rng, data)))


# -- distillers, executors, exporters ---------------------------------------------------------------------------------


@frozen
class Soft:
    """Soft cross entropy, or another function of two signals.

    loss: the function
    """

    loss: typing.Any = algorithms.SoftLabels().loss

    def start(self, context):
        return types.SimpleNamespace(taps=(-1,), loss=self.loss)


def of_features(student, teacher):
    return sum((a - b.detach()).square().mean() for a, b in zip(student.features, teacher.features, strict=True))


@pytest.mark.parametrize("check", distillers.distiller_checks)
@pytest.mark.parametrize("loss", [algorithms.SoftLabels().loss, of_features], ids=["logits", "features"])
def test_a_distiller_that_keeps_its_promises_passes(loss, check):
    check(Soft(loss))


@pytest.mark.parametrize(("loss", "check"), [
    (lambda s, t: (s.logits - t.logits).square().mean(), distillers.teaches_the_student_and_not_the_teacher),
    (lambda s, t: (s.logits - t.logits.detach()).square(), distillers.gives_a_finite_scalar),
    (lambda s, t: (s.logits - t.logits.detach()).square().sum(), distillers.its_loss_is_a_mean_over_samples),
    (lambda s, t: -(t.logits.detach().softmax(0) * s.logits.log_softmax(0)).sum(0).mean(),
     distillers.its_loss_is_a_mean_over_samples),
    (lambda s, t: s.logits.square().mean(), distillers.is_least_where_student_and_teacher_agree),
    (lambda s, t: s.logits.detach().exp().sum() + 0 * s.logits.sum(), distillers.makes_a_student_more_like_its_teacher),
], ids=["both", "vector", "sum", "over the batch", "alone", "flat"])  # fmt: skip
def test_a_distiller_that_breaks_a_promise_is_found_out(loss, check):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check(Soft(loss))


@frozen
class Threads:
    """Threads."""

    def start(self):
        return futures.ThreadPoolExecutor(2)


@pytest.mark.parametrize("check", executors.executor_checks)
def test_an_executor_that_keeps_its_promises_passes(check):
    check(Threads())


def test_an_executor_that_swallows_exceptions_is_found_out():
    class Quiet(futures.ThreadPoolExecutor):
        def submit(self, function, *given):
            return super().submit(lambda: None if function is executors.wrong else function(*given))

    fails(executors.brings_back_exceptions, types.SimpleNamespace(start=lambda: Quiet(2)))


@frozen
class Text:
    """The network as text.

    write_it: what is written, from network, example and path
    """

    write_it: typing.Any = lambda network, example, path: path.write_text(str(network))

    def write(self, network, folder, context):
        path = folder / "network.txt"
        self.write_it(network, context.example, path)
        return path


@pytest.mark.parametrize("check", exporters.exporter_checks)
def test_an_exporter_that_keeps_its_promises_passes(check):
    check(Text())


def makes_folders(network, example, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")


def draws(network, example, path):
    path.write_text(str(torch.randn(1)))


@pytest.mark.parametrize(("write", "check"), [
    (lambda network, example, path: path.touch(), exporters.writes_a_file_into_the_folder_and_gives_its_path),
    (makes_folders, exporters.a_missing_folder_is_an_error_of_the_system),
    (draws, exporters.leaves_the_network_and_the_generators_as_they_were),
    (lambda network, example, path: path.write_text(str(time.time_ns())),
     exporters.writes_a_file_into_the_folder_and_gives_its_path),
    (lambda network, example, path: path.write_text(str(network.train())),
     exporters.leaves_the_network_and_the_generators_as_they_were),
], ids=["empty", "makes folders", "draws", "dates", "trains"])  # fmt: skip
def test_an_exporter_that_breaks_a_promise_is_found_out(write, check):
    fails(check, Text(write))


# -- commands, listeners, mutables, distributions ---------------------------------------------------------------------


def silent(parser):
    parser.add_argument("--loud")
    return lambda options: 0


def test_a_command_that_breaks_a_promise_is_found_out():
    fails(commands.explains_its_arguments, silent)
    fails(commands.adds_arguments_and_gives_the_command, lambda parser: None)


def test_listeners_hear_every_event_that_there_is():
    heard = []
    for check in listeners.listener_checks:
        check(heard.append)
    assert {type(event) for event in heard} == {*typing.get_args(contracts.Event)}


@pytest.mark.parametrize(("listener", "check"), [
    (print, listeners.writes_nothing_to_stdout),
    (lambda event: isinstance(event, Progress) and time.sleep(0.0012), listeners.is_quick),
    (lambda event: isinstance(event, RunDone) and random.random(), listeners.touches_no_global_generator),
    (lambda event: isinstance(event, TrialDone) and event.trial.metrics.clear(), listeners.hears_every_event),
], ids=["prints", "slow", "draws", "takes out"])  # fmt: skip
def test_a_listener_that_breaks_a_promise_is_found_out(listener, check):
    fails(check, listener)


def test_what_a_components_own_thread_draws_counts_and_what_older_threads_draw_does_not():
    def listener(event):
        if isinstance(event, RunDone):
            with futures.ThreadPoolExecutor(1) as own:
                own.submit(random.randint, 0, 9).result()

    with pytest.raises(AssertionError, match=r"drew from Python's global generator:\n(.*\n)*.*random\.py"):
        listeners.touches_no_global_generator(listener)
    with futures.ThreadPoolExecutor(1) as older:
        older.submit(int).result()
        listeners.touches_no_global_generator(lambda event: older.submit(random.randint, 0, 9).result())


KEY = {key: Variable(key, choices) for key, choices in {"i": (2, 4), "o": (3, 6), "k": (1, 3), "d": (1, 2)}.items()}
LAYERS = {
    "conv": lambda: small.Conv(KEY["i"], KEY["o"], KEY["k"]),
    "norm": lambda: small.Norm(KEY["o"]),
    "depth": lambda: small.Depth([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)], KEY["d"]),
}


@pytest.mark.parametrize("check", mutables.mutable_checks)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_that_keeps_its_promises_passes(layer, check):
    check(layer)


class Off(small.Conv):
    def cost(self, positions):
        return small.conv_cost(1, 1, 1, positions, 1, True)


class Unlike(small.Conv):
    def export(self):
        plain = super().export()
        plain.padding_mode, plain.stride = "zeros", (2, 2)
        return plain


class Whole(small.Conv):
    def forward(self, x):
        return super().forward(x) + 0.01 * self.weight.sum()

    def export(self):
        plain = super().export()
        plain.bias.data += 0.01 * self.weight.sum()
        return plain


class Stale(small.Conv):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.elastic.choice = {**self.elastic.choice, "kernel": 1}


class Ungated(small.Depth):
    def forward(self, x):
        return [block(x) for block in self.blocks][self.elastic.choice["depth"] - 1]


class Mixing(small.Conv):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Detached(small.Conv):
    """Its weight has no gradient."""

    def active(self):
        weight, bias = super().active()
        return weight.detach(), bias


class Ignoring(small.Conv):
    """Its bias has no effect."""

    def active(self):
        weight, bias = super().active()
        return weight, torch.zeros_like(bias)


class Remembered(small.Conv):
    """Goes on with the cuts of its first forward under an arch."""

    def active(self):
        if torch.is_grad_enabled():
            return super().active()
        cuts = self.__dict__.setdefault("cuts", {})
        return cuts.setdefault(str(self.elastic.choice), [tensor.clone() for tensor in super().active()])


class Overwriting(small.Conv):
    def forward(self, x):
        return super().forward(nn.functional.relu_(x))


@pytest.mark.parametrize(("cls", "check"), [
    (Detached, mutables.trains_the_active_part_alone),
    (Ignoring, mutables.has_no_weight_that_no_arch_uses),
    (Remembered, mutables.can_be_copied_and_pickled),
    (Overwriting, mutables.takes_any_arch_for_a_while),
    (Mixing, mutables.takes_any_arch_for_a_while),
    (Off, mutables.costs_what_its_export_costs),
    (Whole, mutables.trains_the_active_part_alone),
    (Stale, mutables.states_its_values_and_begins_with_the_largest),
], ids=lambda part: part.__name__)  # fmt: skip
def test_a_layer_that_breaks_a_promise_is_found_out(cls, check):
    fails(check, lambda: cls(KEY["i"], KEY["o"], KEY["k"]))


def test_a_layer_that_is_not_what_it_exports_or_gates_is_found_out():
    with pytest.raises(Exception, match="differs from the supernet"):
        mutables.exports_to_plain_torch(lambda: Unlike(KEY["i"], KEY["o"], KEY["k"]))
    fails(mutables.runs_what_its_gates_say, lambda: Ungated([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)], KEY["d"]))


class Forgetful(nn.BatchNorm2d):
    """A norm of several parts, whose statistics under an arch are copies that are written back by its forward alone."""

    def __init__(self, *parts):
        outputs = Dimension.of([*parts])
        super().__init__(outputs.allocated)
        self.elastic = Elastic({"outputs": outputs})

    @property
    def rows(self):
        sizes = self.elastic.values["outputs"].sizes
        starts = itertools.accumulate(sizes, initial=0)
        return torch.cat(
            [start + torch.arange(n) for start, n in zip(starts, self.elastic.choice["outputs"], strict=False)]
        )

    @property
    def running_mean(self):
        return nn.Module.__getattr__(self, "running_mean")[self.rows]

    @property
    def running_var(self):
        return nn.Module.__getattr__(self, "running_var")[self.rows]

    def store(self, mean, var):
        self._buffers["running_mean"][self.rows], self._buffers["running_var"][self.rows] = mean, var

    def forward(self, x):
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight[self.rows], self.bias[self.rows]
        normed = nn.functional.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
        if self.training:
            self.store(mean, var)
        return normed

    def export(self):
        plain = nn.BatchNorm2d(len(self.rows))
        tensors = (self.weight[self.rows], self.bias[self.rows], self.running_mean, self.running_var, torch.tensor(0))
        plain.load_state_dict(dict(zip(plain.state_dict(), tensors, strict=True)))
        return plain.train(self.training)


class Remembering(Forgetful):
    def statistics(self):
        return self.running_mean, self.running_var

    def set_statistics(self, mean, var):
        self.store(mean, var)


def test_statistics_of_several_parts_are_written_where_they_are_found_again():
    mutables.recalibrates_as_its_export_does(lambda: Remembering(KEY["i"], KEY["o"]))
    fails(mutables.recalibrates_as_its_export_does, lambda: Forgetful(KEY["i"], KEY["o"]))


def test_a_distribution_that_breaks_a_promise_is_found_out(monkeypatch):
    @hookimpl
    def corenas_searches():
        return {}

    @frozen
    class Mute:
        """Explains nothing."""

        n: int = 1

        def start(self, problem, rng): ...

    unknown, mute = types.ModuleType("unknown_hook"), types.ModuleType("mute_options")
    unknown.corenas_searches = corenas_searches
    mute.corenas_searchers = hookimpl(lambda: {"mute": Mute})
    for module in (unknown, mute):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    fails(distributions.is_a_plugin_that_the_catalogue_takes, "unknown_hook")
    fails(distributions.answers_only_hooks_that_there_are, "unknown_hook")
    fails(distributions.offers_what_the_contracts_ask_for, "mute_options")
    fails(distributions.is_a_plugin_that_the_catalogue_takes, "surely_no_such_module")


def test_small_things_are_what_they_say():
    assert mutators.context(small.make_space()).space.size == small.make_space().size
    marks = small.used(small.supernet(small.make_space(), small.Task()), [small.make_space().smallest()],
                       torch.zeros(2, 1, 8, 8))  # fmt: skip
    assert (
        sum(int(mark.sum()) for mark in marks.values())
        == evaluators.context().cost.of([small.make_space().smallest()])[0]["params"]
    )
    assert json.dumps(small.TABLE)
    assert Path(small.__file__).name == "small.py"
