"""A set of mutables, a network, a task and an algorithm, as small as they can be, for tests without any plugin."""

import copy
import types
from typing import ClassVar

import tomli_w
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import nn

from corenas.contracts import Metric, Phase, Progress
from corenas.cost import conv_cost, linear_cost, norm_cost
from corenas.hookspecs import hookimpl
from corenas.mutable import apply, chosen
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.spec import load_spec
from corenas.value import Dimension, as_value, at_least, equals


class Conv(nn.Conv2d):
    def __init__(self, inputs, outputs, kernel=1, stride=1, bias=True):
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated, as_value(kernel).largest, stride, bias=bias)
        self.values = {"inputs": inputs, "outputs": outputs, "kernel": as_value(kernel)}
        self.choice = chosen(self.values)

    def active(self):
        i, o, k = sum(self.choice["inputs"]), sum(self.choice["outputs"]), self.choice["kernel"]
        return self.weight[:o, :i, :k, :k], None if self.bias is None else self.bias[:o]

    def forward(self, x):
        return F.conv2d(x, *self.active(), self.stride, self.choice["kernel"] // 2)

    def cost(self, positions):
        inputs, outputs, kernel = self.values["inputs"].size, self.values["outputs"].size, self.values["kernel"]
        return conv_cost(inputs, outputs, kernel * kernel, positions, 1, self.bias is not None)

    def export(self):
        weight, bias = self.active()
        plain = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], self.stride, self.choice["kernel"] // 2,
                          bias=bias is not None)  # fmt: skip
        return filled(plain, self, weight=weight, bias=bias)


class Norm(nn.BatchNorm2d):
    def __init__(self, features):
        values = {"outputs": Dimension.of(features)}
        super().__init__(values["outputs"].allocated)
        self.values, self.choice = values, chosen(values)

    def active(self):
        (n,) = self.choice["outputs"]
        return self.running_mean[:n], self.running_var[:n], self.weight[:n], self.bias[:n]

    def forward(self, x):
        mean, var, weight, bias = self.active()
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def cost(self, positions):
        return norm_cost(self.values["outputs"].size, True)

    def export(self):
        mean, var, weight, bias = self.active()
        plain = filled(nn.BatchNorm2d(len(mean)), self, weight=weight, bias=bias)
        plain.running_mean, plain.running_var = mean.clone(), var.clone()
        return plain


class Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        values = {"inputs": Dimension.of(inputs), "outputs": Dimension.of(outputs)}
        super().__init__(values["inputs"].allocated, values["outputs"].allocated)
        self.values, self.choice = values, chosen(values)

    def active(self):
        return self.weight[:, : sum(self.choice["inputs"])], self.bias

    def forward(self, x):
        return F.linear(x, *self.active())

    def cost(self, positions):
        return linear_cost(self.values["inputs"].size, self.values["outputs"].size, positions, True)

    def export(self):
        weight, bias = self.active()
        return filled(nn.Linear(weight.shape[1], weight.shape[0]), self, weight=weight, bias=bias)


def filled(plain, source, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(plain, name, nn.Parameter(tensor.detach().clone()))
    return plain.train(source.training)


class Mixed(nn.Module):
    def __init__(self, candidates, op):
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.values = {"op": op}
        self.choice = chosen(self.values)

    def gates(self):
        return [(module, equals(self.values["op"], name)) for name, module in self.candidates.items()]

    def forward(self, x):
        op = self.choice["op"]
        if isinstance(op, torch.Tensor):
            return sum(weight * candidate(x) for weight, candidate in zip(op, self.candidates.values(), strict=True))
        return self.candidates[op](x)


class Depth(nn.Module):
    def __init__(self, blocks, depth):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.values = {"depth": depth}
        self.choice = chosen(self.values)

    def gates(self):
        return [(block, at_least(self.values["depth"], i + 1)) for i, block in enumerate(self.blocks)]

    def forward(self, x):
        for block in [*self.blocks][: self.choice["depth"]]:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, width, kernel, norm):
        super().__init__()
        self.conv = Conv(width, width, kernel)
        self.norm = Norm(width) if norm else nn.Identity()

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Body(nn.Module):
    """A stem, blocks with shortcuts, and one of three operations."""

    def __init__(self, tree, norm=True):
        super().__init__()
        width = tree["width"]
        self.stem = Conv(1, width, 3, stride=2)
        self.norm = Norm(width) if norm else nn.Identity()
        self.stage = Depth([Block(width, block["kernel"], norm) for block in tree["blocks"]], tree["depth"])
        candidates = {"conv": Conv(width, width, 3), "pool": nn.AvgPool2d(3, 1, 1), "skip": nn.Identity()}
        self.op = Mixed(candidates, tree["op"])
        self.feat_dims = [Dimension.of(width)]

    def features(self, x):
        return [self.op(self.stage(F.relu(self.norm(self.stem(x)))))]


class Head(nn.Module):
    def __init__(self, dims, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = Linear(dims[-1], 3)

    def forward(self, features):
        return self.linear(self.dropout(features[-1].mean((2, 3))))


TABLE = {"width": [4, 6, 8], "op": ["conv", "pool", "skip"], "depth": [1, 2, 3], "block": {"kernel": [1, 3]}}


def make_space(**changes):
    return SearchSpace.from_table(TABLE | changes)


class Backbone:
    def __init__(self, norm=True):
        self.norm = norm

    def build(self, space):
        return Body(space.tree, self.norm)


class Data(torch.utils.data.Dataset):
    def __init__(self, images, labels, augmented):
        self.images, self.labels, self.augmented = images, labels, augmented

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        return image + 0.1 * torch.randn(image.shape) if self.augmented else image, self.labels[i]


class Meter:
    def __init__(self):
        self.seen = self.right = 0

    def update(self, outputs, batch):
        self.seen += len(batch[1])
        self.right += int((outputs.argmax(1) == batch[1]).sum())

    def compute(self):
        return {"top1": 100 * self.right / self.seen}


class Task:
    """Tell three noisy patterns of 8x8 pixels apart."""

    metrics: ClassVar = {"top1": Metric("%", "max")}

    def __init__(self, dropout=0.0, **sizes):
        self.splits = {"train": 96, "valid": 48, "test": 30} | sizes
        self.dropout = dropout
        self.example = torch.zeros(1, 1, 8, 8)
        rng = torch.Generator().manual_seed(7)
        patterns = torch.randn(3, 1, 8, 8, generator=rng)
        self.data = {}
        for split, size in self.splits.items():
            labels = torch.randint(3, (size,), generator=rng)
            self.data[split] = patterns[labels] + 0.3 * torch.randn(size, 1, 8, 8, generator=rng), labels

    def dataset(self, split, augmented):
        return Data(*self.data[split], augmented)

    def head(self, dims):
        return Head(dims, self.dropout)

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def logits(self, outputs):
        return outputs

    def meter(self):
        return Meter()


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


class Trainer:
    """Trains all archs of a step on the labels."""

    def __init__(self, model, task, phases):
        self.model, self.task = model, task
        self.phases = [phase if isinstance(phase, Phase) else Phase(*phase) for phase in phases]
        self.seen = []

    def train_step(self, batch, step):
        losses = []
        for arch in step.archs:
            with apply(self.model, arch):
                losses.append(step.backward(self.task.loss(self.task.forward(self.model, batch), batch)))
        self.seen.append((step.index, step.lr, tuple(step.archs)))
        return {"loss": torch.stack(losses).mean()}


# -- the same as plugins, for whole runs ------------------------------------------------------------------------------


@frozen
class TaskOptions:
    """The three patterns."""

    def start(self, rng, data=True):
        return Task()


@frozen
class BackboneOptions:
    """The toy network."""

    def build(self, space):
        return Body(space.tree)


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
class Accuracy:
    """The task's metrics of a subnet of the trained supernet."""

    cheap: ClassVar = False

    def provides(self, task):
        return task.metrics

    def start(self, context):
        return lambda archs, fidelity: [context.evaluation(arch, "valid", fidelity) for arch in archs]


@frozen
class Names:
    """Writes the names of the layers."""

    def write(self, network, example, folder, title):
        assert not network.training
        network(example)
        (folder / "names.txt").write_text("\n".join([title, *(name for name, _ in network.named_children())]))
        return folder / "names.txt"


OFFERS = {
    "tasks": TaskOptions, "backbones": BackboneOptions, "mutators": MutatorOptions, "algorithms": AlgorithmOptions,
    "searchers": SearcherOptions, "evaluators": Accuracy, "exporters": Names,
}  # fmt: skip


def make_catalogue(**offers):
    """A catalogue in which each kind has one component, named "toy"."""
    hooks = {f"corenas_{kind}": hookimpl(lambda cls=cls: {"toy": cls}) for kind, cls in (OFFERS | offers).items()}
    return load_catalogue(found=[], extra=[("toys", types.SimpleNamespace(**hooks))])


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


def same(one, two):
    """Whether two nests of plain data and tensors are the same, bit for bit."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
