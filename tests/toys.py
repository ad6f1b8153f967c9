"""Toys for tests without any plugin: those of `corenas.testing.small`, and the same as plugins for whole runs."""

import copy
from typing import ClassVar

import tomli_w
from attrs import frozen

from corenas.contracts import Progress
from corenas.run.spec import load_spec
from corenas.testing import small
from corenas.testing.small import (  # noqa: F401 - what tests import from here
    TABLE,
    Accuracy,
    Block,
    Body,
    Conv,
    Data,
    Depth,
    Head,
    Linear,
    Meter,
    Mixed,
    Norm,
    Task,
    Trainer,
    filled,
    make_space,
    same,
)


class Backbone:
    def __init__(self, norm=True):
        self.norm = norm

    def build(self, space):
        return Body(space.tree, self.norm)


class Mutator:
    """Samplers that draw n archs a step; with `scored` the better of two each."""

    def __init__(self, n=1, scored=False):
        self.n, self.scored = n, scored

    def start(self, context):
        sampler = copy.copy(self)
        sampler.context = context
        return sampler

    def sample(self, score):
        draw = [self.context.space.sample(self.context.rng) for _ in range(self.n * (1 + self.scored))]
        if not self.scored:
            return draw
        losses = score(draw)
        return [draw[i] if losses[i] <= losses[i + self.n] else draw[i + self.n] for i in range(self.n)]


# -- the same as plugins, for whole runs ------------------------------------------------------------------------------


@frozen
class TaskOptions:
    """The three patterns."""

    def start(self, rng, data=True):
        return Task()


@frozen
class BackboneOptions:
    """The toy network.

    norm: whether it has batch norm
    """

    norm: bool = True

    def build(self, space):
        return Body(space.tree, self.norm)


@frozen
class MutatorOptions:
    """One path a step."""

    def start(self, context):
        return Mutator().start(context)


@frozen
class AlgorithmOptions:
    """Trains on the labels."""

    stages: ClassVar = ("train", "search")
    needs: ClassVar = ("mutator", "searcher")

    def start(self, context):
        return Trainer(context.supernet, context.task, [(context.space, context.train)])


class RandomSearch:
    def __init__(self, space, rng):
        self.space, self.rng = space, rng

    def ask(self, n):
        return [self.space.sample(self.rng) for _ in range(n)]

    def tell(self, trials):
        pass

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.rng.bit_generator.state = state["rng"]


@frozen
class SearcherOptions:
    """At random."""

    def start(self, problem, rng):
        return RandomSearch(problem.space, rng)


@frozen
class Names:
    """Writes the names of the layers."""

    def write(self, network, folder, context):
        assert not network.training
        network(context.example)
        (folder / "names.txt").write_text("\n".join([context.title, *(name for name, _ in network.named_children())]))
        return folder / "names.txt"


DIGITS = {
    "space": "mobilenetv3-tiny", "backbone": "mobilenetv3", "algorithm": "spos", "mutator": "uniform",
    "task": {"type": "classification", "data": "digits"}, "train": {"epochs": 3, "batch_size": 32},
    "evaluators": ["accuracy"], "searcher": "random", "search": {"trials": 30},
}  # fmt: skip
"""The table of a spec of real plugins, that is looked at and not run."""
OFFERS = {
    "tasks": TaskOptions, "backbones": BackboneOptions, "mutators": MutatorOptions, "algorithms": AlgorithmOptions,
    "searchers": SearcherOptions, "evaluators": Accuracy, "exporters": Names,
}  # fmt: skip


def make_catalogue(**offers):
    """A catalogue in which each kind has one component, named "toy"."""
    return small.make_catalogue("toy", OFFERS | offers)


def make_spec(folder, catalogue, **changes):
    """A spec of toys in a folder; what is None is left out."""
    table = {
        "space": TABLE, **dict.fromkeys(["task", "backbone", "mutator", "algorithm", "searcher"], "toy"),
        "evaluators": ["toy"], "train": {"epochs": 1, "batch_size": 32},
        "search": {"trials": 12}, "export": {"formats": ["toy"]},
    }  # fmt: skip
    table = {key: value for key, value in (table | changes).items() if value is not None}
    (folder / "spec.toml").write_text(tomli_w.dumps(table))
    return load_spec(folder / "spec.toml", catalogue)[0]


def killer(points):
    """A listener that interrupts a training after some epochs."""
    left = iter(range(points - 1))

    def emit(event):
        if isinstance(event, Progress) and event.point and next(left, None) is None:
            raise KeyboardInterrupt

    return emit
