"""A space, a network, a task and a mutator, as small as they can be, for checks that need something to run on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric, MutatorContext, Phase, Step
from corenas.hookspecs import hookimpl
from corenas.mutable import Elastic, LayerCost, apply, conv_cost, linear_cost, mutables, norm_cost
from corenas.options import structure
from corenas.plugins import Catalogue, load_catalogue
from corenas.space import Arch, SearchSpace
from corenas.supernet import Supernet, build_supernet
from corenas.value import Dimension, Value, as_value, at_least, equals

Size = Dimension | Value | int

# -- layers -----------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """A convolution of which the first channels and the first rows and columns of the kernel are active."""

    def __init__(
        self, inputs: Size, outputs: Size, kernel: Value | int = 1, stride: int = 1, bias: bool = True
    ) -> None:
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated, as_value(kernel).largest, stride, bias=bias)
        self.inputs, self.outputs, self.kernel = inputs, outputs, as_value(kernel)
        self.elastic = Elastic({"inputs": inputs, "outputs": outputs, "kernel": self.kernel})

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Views of the chosen part of weight and bias."""
        i, o, k = sum(self.elastic.choice["inputs"]), sum(self.elastic.choice["outputs"]), self.elastic.choice["kernel"]
        return self.weight[:o, :i, :k, :k], None if self.bias is None else self.bias[:o]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        return F.conv2d(x, *self.active(), self.stride, self.elastic.choice["kernel"] // 2)

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` pixels."""
        taps, biased = self.kernel * self.kernel, self.bias is not None
        return conv_cost(self.inputs.size, self.outputs.size, taps, positions, 1, biased)

    def export(self) -> nn.Conv2d:
        """The chosen part as a plain convolution."""
        weight, bias = self.active()
        outputs, inputs, kernel, _ = weight.shape
        plain = nn.Conv2d(inputs, outputs, kernel, self.stride[0], kernel // 2, bias=bias is not None, device="meta")
        return filled(plain, self, weight=weight, bias=bias)


class Norm(nn.BatchNorm2d):
    """A batch norm of which the first features are active."""

    def __init__(self, features: Size) -> None:
        outputs = Dimension.of(features)
        super().__init__(outputs.allocated)
        self.outputs = outputs
        self.elastic = Elastic({"outputs": outputs})

    def active(self) -> tuple[Tensor, ...]:
        """Views of the chosen part of mean, variance, weight and bias."""
        (n,) = self.elastic.choice["outputs"]
        return self.running_mean[:n], self.running_var[:n], self.weight[:n], self.bias[:n]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(n, active features, h, w) -> the same shape."""
        mean, var, weight, bias = self.active()
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum or 0.0, self.eps)

    def cost(self, positions: Value) -> LayerCost:
        """Two parameters a feature."""
        return norm_cost(self.outputs.size, True)

    def export(self) -> nn.BatchNorm2d:
        """The chosen part as a plain batch norm."""
        mean, var, weight, bias = self.active()
        plain = filled(nn.BatchNorm2d(len(mean)), self, weight=weight, bias=bias)
        plain.running_mean, plain.running_var = mean.clone(), var.clone()
        return plain


class Linear(nn.Linear):
    """A linear layer of which the first inputs are active."""

    def __init__(self, inputs: Size, outputs: Size) -> None:
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated)
        self.inputs, self.outputs = inputs, outputs
        self.elastic = Elastic({"inputs": inputs, "outputs": outputs})

    def active(self) -> tuple[Tensor, Tensor]:
        """Views of the chosen part of weight and bias."""
        return self.weight[:, : sum(self.elastic.choice["inputs"])], self.bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(n, active inputs) -> (n, outputs)."""
        return F.linear(x, *self.active())

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` tokens."""
        return linear_cost(self.inputs.size, self.outputs.size, positions, True)

    def export(self) -> nn.Linear:
        """The chosen part as a plain linear layer."""
        weight, bias = self.active()
        return filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), self, weight=weight, bias=bias)


def filled(plain: Any, source: nn.Module, **tensors: Tensor | None) -> Any:
    """A plain layer with copies of tensors as its parameters, in the mode of the layer that they come from."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(plain, name, nn.Parameter(tensor.detach().clone()))
    return plain.train(source.training)


class Mixed(nn.Module):
    """One of several operations; the weighted sum of all where its choice is a tensor of weights."""

    def __init__(self, candidates: Mapping[str, nn.Module], op: Value) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.names = tuple(candidates)
        self.op = op
        self.elastic = Elastic({"op": op})

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Each candidate runs where it is the choice."""
        return [(module, equals(self.op, name)) for name, module in self.candidates.items()]

    @property
    def segments(self) -> Sequence[nn.Module]:
        """The candidates: the one that is chosen is all that runs."""
        return [*self.candidates.values()]

    def forward(self, x: Tensor) -> Tensor:
        """What the chosen candidate gives."""
        op = self.elastic.choice["op"]
        if isinstance(op, Tensor):
            return sum(weight * candidate(x) for weight, candidate in zip(op, self.candidates.values(), strict=True))  # type: ignore[return-value]
        return self.candidates[op](x)


class Depth(nn.Module):
    """The first blocks of a stage."""

    def __init__(self, blocks: Iterable[nn.Module], depth: Value) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.depth = depth
        self.elastic = Elastic({"depth": depth})

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """A block runs where the depth reaches it."""
        return [(block, at_least(self.depth, i + 1)) for i, block in enumerate(self.blocks)]

    @property
    def segments(self) -> Sequence[nn.Module]:
        """The blocks, one after the other."""
        return [*self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """The active blocks one after the other."""
        for block in [*self.blocks][: self.elastic.choice["depth"]]:
            x = block(x)
        return x


# -- the network ------------------------------------------------------------------------------------------------------

TABLE = {"width": [4, 6, 8], "op": ["conv", "pool", "skip"], "depth": [1, 2, 3], "block": {"kernel": [1, 3]}}
"""The space of `Body`: 126 archs, some variables of which are active only at some depths."""


def make_space(**changes: Any) -> SearchSpace:
    """The space of `TABLE`, with some of it changed."""
    return SearchSpace.from_table(TABLE | changes)


class Block(nn.Module):
    """A convolution with a shortcut."""

    def __init__(self, width: Value, kernel: Value, norm: bool) -> None:
        super().__init__()
        self.conv = Conv(width, width, kernel)
        self.norm = Norm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) -> the same shape."""
        return F.relu(x + self.norm(self.conv(x)))


class Body(nn.Module):
    """A stem, blocks with shortcuts, and one of three operations.

    features: (n, channels, h, w) -> [(n, width, h / 2, w / 2)]
    """

    def __init__(self, tree: Mapping[str, Any], norm: bool = True, channels: int = 1) -> None:
        super().__init__()
        width = tree["width"]
        self.stem = Conv(channels, width, 3, stride=2)
        self.norm = Norm(width) if norm else nn.Identity()
        depth, op = as_value(tree["depth"]), as_value(tree["op"])
        blocks = tree["blocks"][: depth.largest]
        self.stage = Depth([Block(width, as_value(block["kernel"]), norm) for block in blocks], depth)
        candidates = {"conv": Conv(width, width, 3), "pool": nn.AvgPool2d(3, 1, 1), "skip": nn.Identity()}
        self.op = Mixed({name: candidate for name, candidate in candidates.items() if name in op.possible}, op)
        self.segments = [self.stem, self.stage, self.op]
        self.feat_dims = [Dimension.of(width)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Its features."""
        return self.features(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> [(n, width, h / 2, w / 2)]."""
        return [self.op(self.stage(F.relu(self.norm(self.stem(x)))))]


@frozen
class Layout:
    """The tables of the small network's spaces.

    width: channels
    op: which operation comes last
    depth: number of blocks
    blocks: what differs from block to block
    """

    width: Value
    op: Value
    depth: Value
    blocks: tuple[Mapping[str, Value], ...]


@frozen
class Backbone:
    """The small network.

    norm: whether it has batch norm
    channels: of its images
    """

    norm: bool = True
    channels: int = 1

    layout: ClassVar[type] = Layout

    def build(self, space: SearchSpace) -> Body:
        """The network of a space. Raises UserError for one of other tables."""
        structure(space.tree, Layout)
        return Body(space.tree, self.norm, self.channels)


class Head(nn.Module):
    """Pooling, dropout and a linear classifier of three classes."""

    def __init__(self, dims: Sequence[Dimension], dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = Linear(dims[-1], 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features -> logits (n, 3)."""
        return self.linear(self.dropout(features[-1].mean((2, 3))))


# -- the task ---------------------------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset[Any]):
    """Images and labels; augmented images are noisy."""

    def __init__(self, images: Tensor, labels: Tensor, augmented: bool) -> None:
        self.images, self.labels, self.augmented = images, labels, augmented

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images[i]
        return image + 0.1 * torch.randn(image.shape) if self.augmented else image, self.labels[i]


class Meter:
    """Counts right answers."""

    def __init__(self) -> None:
        self.seen = self.right = 0
        self.each: list[Tensor] = []

    def update(self, outputs: Tensor, batch: Any) -> None:
        """Count a batch."""
        self.seen += len(batch[1])
        self.each.append(outputs.argmax(1) == batch[1])
        self.right += int(self.each[-1].sum())

    def scores(self, metric: str) -> Tensor:
        """1 for each right answer, 0 for each wrong one."""
        return torch.cat(self.each)

    def compute(self) -> dict[str, float]:
        """Percent of right answers."""
        return {"top1": 100 * self.right / self.seen}


class Task:
    """Tell three noisy patterns of 8x8 pixels apart; live already.

    asked: the splits that were asked for, in order
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"top1": Metric("%", "max", share=True)})

    def __init__(self, dropout: float = 0.0, **sizes: int) -> None:
        self.splits: Mapping[str, int] = {"train": 96, "valid": 48, "test": 30} | sizes
        self.dropout = dropout
        self.asked: list[str] = []
        self.example = torch.zeros(1, 1, 8, 8)
        rng = torch.Generator().manual_seed(7)
        patterns = torch.randn(3, 1, 8, 8, generator=rng)
        self.data = {}
        for split, size in self.splits.items():
            labels = torch.randint(3, (size,), generator=rng)
            self.data[split] = patterns[labels] + 0.3 * torch.randn(size, 1, 8, 8, generator=rng), labels

    def dataset(self, split: str, augmented: bool) -> Data:
        """A split."""
        self.asked.append(split)
        images, labels = self.data[split]
        return Data(images, labels, augmented and split != "test")

    def head(self, feat_dims: Sequence[Dimension]) -> nn.Module:
        """A linear classifier."""
        return Head(feat_dims, self.dropout)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits (n, 3)."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, batch[1])

    def logits(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs

    def meter(self) -> Meter:
        """A new count."""
        return Meter()


@frozen
class Patterns:
    """The small task."""

    def start(self, rng: np.random.Generator, data: bool = True) -> Task:
        """The patterns are always the same."""
        task = Task()
        if not data:
            task.splits = {}
        return task


# -- training ---------------------------------------------------------------------------------------------------------


class Trainer:
    """Trains all archs of a step on the labels."""

    def __init__(self, model: nn.Module, task: LiveTask, phases: Sequence[Any]) -> None:
        self.model, self.task = model, task
        self.phases: Sequence[Phase] = [p if isinstance(p, Phase) else Phase(*p) for p in phases]
        self.seen: list[Any] = []

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Each arch on the labels; of a network without archs the whole."""
        losses = []
        for arch in step.archs:
            with apply(self.model, arch):
                losses.append(step.backward(self.task.loss(self.task.forward(self.model, batch), batch)))
        self.seen.append((step.index, step.lr, tuple(step.archs)))
        return {"loss": torch.stack(losses).mean()}


@frozen
class Paths:
    """Draws the archs of a step: a single one at random; of several the first is the largest, the last the smallest.

    n: archs a step, where the phase does not say
    """

    n: int = 3

    def start(self, context: MutatorContext) -> PathSampler:
        """The sampler."""
        return PathSampler(self.n, context)


class PathSampler:
    """What `Paths` draws."""

    def __init__(self, n: int, context: MutatorContext) -> None:
        self.n, self.context = context.paths or n, context

    def sample(self, score: Callable[[Sequence[Arch]], Sequence[float]]) -> list[Arch]:
        """The archs of one step."""
        space = self.context.space
        drawn = [space.sample(self.context.rng) for _ in range(self.n)]
        if self.n > 1:
            drawn[0], drawn[-1] = space.largest(), space.smallest()
        return drawn


# -- whole runs -------------------------------------------------------------------------------------------------------


@frozen
class Accuracy:
    """The task's metrics of a subnet of the trained supernet."""

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """What the task measures."""
        return task.metrics

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Measures on validation data."""
        evaluation = context.evaluation
        assert evaluation is not None
        return lambda archs, fidelity: [evaluation(arch, "valid", fidelity) for arch in archs]


def make_catalogue(name: str, offers: Mapping[str, Any]) -> Catalogue:
    """A catalogue in which each kind (`searchers`) has one component, all of one name."""
    hooks = {f"corenas_{kind}": hookimpl(lambda cls=cls: {name: cls}) for kind, cls in offers.items()}
    return load_catalogue(found=[], extra=[(name, SimpleNamespace(**hooks))])  # type: ignore[list-item]


# -- what checks ask --------------------------------------------------------------------------------------------------


def supernet(space: SearchSpace, task: LiveTask, backbone: Any = None, seed: int = 0) -> Supernet:
    """A supernet with a task's head, the same for the same seed. Torch's global generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_supernet(backbone or Backbone(channels=task.example.shape[1]), space, task)


def some_archs(space: SearchSpace, n: int = 4, seed: int = 0) -> list[Arch]:
    """The largest arch, the smallest and some at random."""
    rng = np.random.default_rng(seed)
    return [space.largest(), space.smallest(), *space.decode(space.draw(rng, n - 2))]


def used(model: nn.Module, archs: Iterable[Arch], images: Tensor) -> dict[str, Tensor]:
    """Which elements of each parameter of a small supernet the forwards of some archs run through."""
    model = copy.deepcopy(model).train()
    marks = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in marks.parameters():
            parameter.zero_()
    for arch in archs:
        model.zero_grad()
        with apply(model, arch), apply(marks, arch), torch.enable_grad():
            model(images).sum().backward()
            for name, module in model.named_modules():
                if any(p.grad is not None for p in module.parameters(recurse=False)):
                    own = marks.get_submodule(name)
                    parts = own.active() if hasattr(own, "active") else own.parameters(recurse=False)  # type: ignore[operator]
                    with torch.no_grad():
                        for part in parts:
                            if part is not None:
                                part.fill_(1)
    return {name: parameter.detach().bool() for name, parameter in marks.named_parameters()}


def same(one: Any, two: Any) -> bool:
    """Whether two nests of plain data and tensors are the same, bit for bit."""
    if isinstance(one, Mapping):
        return isinstance(two, Mapping) and one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def condition(model: nn.Module) -> dict[str, Any]:
    """Everything that a guest of a model may not change: weights, statistics, gradients, modes, choices, hooks.

    And what torch does with any other model.
    """
    modules = [*model.modules()]
    return {
        "state": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in modules],
        "choices": [dict(mutable.elastic.choice) for mutable in mutables(model)],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
        "surroundings": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()],
    }


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Which parts of two conditions differ."""
    return [name for name in before if not same(before[name], after[name])]
