"""Synflow, NASWOT, grad_norm and jacob_cov of one network on one batch (Abdelfattah et al. 2021, arXiv:2101.08134)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from corenas.contracts import EvaluatorContext, Failure, LiveTask, Measured, Signals
from corenas.errors import UserError
from corenas.loading import Batches
from corenas.space import Arch

Score: TypeAlias = Callable[[nn.Module, LiveTask, Any], float]
"""(network, task, batch) -> a number; the network is given away."""


class LiveScore:
    """Measures one score of networks as they are initialised.

    batch_size: training images that all networks see; None for a score that reads no data
    """

    def __init__(self, name: str, score: Score, context: EvaluatorContext, batch_size: int | None) -> None:
        self.name, self.score, self.context, self.batch_size = name, score, context, batch_size
        # One number for all archs, the same in every process.
        self._seed = int(context.rng(context.space.default()).integers(1 << 31))
        self._known: dict[int, Any] = {}

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured | Failure]:
        """Return the scores of archs; a lower fidelity is a share of the images."""
        batch = self._batch(fidelity)
        return [self._measured(arch, batch) for arch in archs]

    def _batch(self, fidelity: float) -> Any:
        if self.batch_size is None:
            return None
        size, task = max(2, round(fidelity * self.batch_size)), self.context.task
        if size not in self._known:
            (self._known[size],) = Batches(task, "train", size, self.context.device, seed=self._seed, limit=size)
        return self._known[size]

    def _measured(self, arch: Arch, batch: Any) -> Measured | Failure:
        network = self.context.subnet(arch).to(self.context.device).train()
        for module in network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # what it draws is no merit of the network
        with torch.enable_grad():
            score = self.score(network, self.context.task, batch)
        if not math.isfinite(score):
            return Failure(f"a {self.name} of {score}")
        return Measured({self.name: score})


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def synflow(network: nn.Module, task: LiveTask, batch: Any) -> float:
    """Return ln(Σ |w · ∂R/∂w|), R the sum of the outputs for an image of ones, weights made positive, without norms.

    Tanaka et al. 2020 (arXiv:2006.05467), equation 2. The sum grows with the product over all layers, so that the
    logarithm of it is given; double precision has no end to it but in networks of hundreds of layers.
    """
    network.double().eval()  # a batch of one has no statistics; of norms nothing is left anyway
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.register_forward_hook(lambda module, args, output: args[0])
    x = torch.ones_like(task.example, dtype=torch.float64, device=next(network.parameters()).device)
    _answers(task, network(x)).sum().backward()
    flow = sum(float((weight * gradient).abs().sum()) for weight, gradient in _weights(network))
    return math.log(flow) if flow > 0 else -math.inf


def grad_norm(network: nn.Module, task: LiveTask, batch: Any) -> float:
    """Return Σ ‖∂L/∂W‖ over the weights W of convolutions and linear layers, L the task's loss."""
    task.loss(task.forward(network, batch), batch).backward()
    return sum(float(gradient.norm()) for _, gradient in _weights(network))


def jacob_cov(network: nn.Module, task: LiveTask, batch: Any) -> float:
    """Return -Σ (ln(v + k) + 1 / (v + k)), v the eigenvalues of the correlations of the images' gradients, k = 1e-5.

    Mellor et al. 2020 (arXiv:2006.04647v1), section 3; the gradients are those of the sum of the outputs.
    """
    inputs: list[Tensor] = []

    def as_leaf(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1], *args[1:])

    with _hooked(network.register_forward_pre_hook(as_leaf)):
        outputs = _answers(task, task.forward(network, batch))
    (gradients,) = torch.autograd.grad(outputs.sum(), inputs[0])
    values = torch.linalg.eigvalsh(torch.corrcoef(gradients.flatten(1).double())) + 1e-5
    return -float((values.log() + 1 / values).sum())


def naswot(network: nn.Module, task: LiveTask, batch: Any) -> float:
    """Return ln|K|, K the number of units that two images agree on: their activations are both on, or both off.

    Mellor et al. 2021 (arXiv:2006.04647), equation 2. A unit is on where the input of its activation is positive.
    """
    with torch.no_grad(), _Agreement() as agreement:
        task.forward(network, batch)
    if agreement.kernel is None:
        raise ValueError("this network has no activation that is on or off")
    return float(torch.linalg.slogdet(agreement.kernel).logabsdet)


_SWITCHES = (
    functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu6, functional.hardswish,
    functional.silu, functional.gelu,
)  # fmt: skip
"""Activations that are on for positive inputs, as layers or as functions."""


class _Agreement(TorchFunctionMode):
    """Counts for each two images of a batch on how many units they agree; the first axis is the batch."""

    kernel: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SWITCHES:
            on = (args[0].flatten(1) > 0).double()
            agreed = on @ on.T + (1 - on) @ (1 - on).T
            self.kernel = agreed if self.kernel is None else self.kernel + agreed
        return func(*args, **(kwargs or {}))


def _weights(network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the weights of convolutions and linear layers that have a gradient, with it."""
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and module.weight.grad is not None:
            yield module.weight.detach(), module.weight.grad


def _answers(task: LiveTask, outputs: Any) -> Tensor:
    answers = Signals(outputs, task.logits(outputs)).answers
    if answers is None:
        raise UserError("this score needs a task whose outputs are one tensor, or logits", key=("evaluators",))
    return answers


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
