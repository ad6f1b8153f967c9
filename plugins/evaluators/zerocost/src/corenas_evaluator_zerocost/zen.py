"""The Zen-Score (Lin et al. 2021, arXiv:2102.01063, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corenas.contracts import EvaluatorContext, Failure, Measured
from corenas.space import Arch
from corenas_mutable_slices import Residual

if TYPE_CHECKING:
    from corenas_evaluator_zerocost import ZenScore

MOMENTUM: Mapping[str, float] = {"reference": 0.1, "paper": 1.0}
"""Of batch norms, by which their running variance is what a convention takes for the variance."""
Norm = nn.modules.batchnorm._BatchNorm


class LiveZenScore:
    """Scores networks one after the other; of each there is a fresh one, and no supernet."""

    def __init__(self, options: ZenScore, context: EvaluatorContext) -> None:
        self.options, self.context = options, context

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured | Failure]:
        """Return the scores of archs; a lower fidelity is a share of the repeats."""
        return [self._measured(arch, max(1, round(fidelity * self.options.repeats))) for arch in archs]

    def _measured(self, arch: Arch, repeats: int) -> Measured | Failure:
        options, device = self.options, self.context.device
        network = self.context.subnet(arch).to(device)
        if options.no_reslink:
            drop_shortcuts(network)
        channels, *size = self.context.task.example.shape[1:]
        if options.resolution is not None:
            size = [options.resolution] * 2
        seed = int(self.context.rng(arch).integers(1 << 62))
        generator = torch.Generator(device).manual_seed(seed)
        shape = (options.batch_size, channels, *size)
        momentum = MOMENTUM[options.convention]
        scores = [zen_score(network, shape, generator, options.gamma, momentum) for _ in range(repeats)]
        if not all(map(math.isfinite, scores)):
            return Failure(f"a Zen-Score of {scores}: features do not move with the input, or have no end")
        return Measured({"zen_score": fmean(scores)}, {"zen_score_std": pstdev(scores)} if repeats > 1 else {})


@torch.no_grad()
def zen_score(
    network: nn.Module, shape: Sequence[int], generator: torch.Generator, gamma: float = 0.01, momentum: float = 0.1
) -> float:
    """Return the Zen-Score of a network with new weights for random images; its weights are others afterwards.

    network: its `backbone` has `features`, of which those before global pooling count (`before_pooling`)
    shape: of the images, (n, channels, height, width)
    momentum: of batch norms; with 1 their running variance is that of the last batch, as in the paper

    On a plain convolution of 3x3, batch norm and ReLU, 3 to 64 channels, at 32x32 it is 6.434, with a momentum of 1
    7.189: d is 64 · 32² · 0.5 · 0.01 · sqrt(2 / pi), the variance of what comes out of the convolution 25.6.
    """
    draw_weights(network, generator)
    norms = [module for module in network.modules() if isinstance(module, Norm)]
    for norm in norms:
        norm.momentum = momentum
        norm.reset_running_stats()  # each score begins with a variance of 1
    network.train()
    _no_dropout(network)
    x, noise = (torch.randn(*shape, generator=generator, device=generator.device) for _ in range(2))  # line 3
    moved = before_pooling(network, x) - before_pooling(network, x + gamma * noise)
    # Line 4 has the Frobenius norm; the released code sums absolute differences, over all but the batch.
    delta = moved.abs().flatten(1).sum(1).mean()
    # Line 5: the mean over channels. The variance of a norm that no forward has run through is still 1.
    variances = [norm.running_var.mean() for norm in norms if norm.running_var is not None]
    return math.log(delta) + 0.5 * sum(map(math.log, variances)) if delta > 0 else -math.inf


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights of convolutions and linear layers from N(0, 1); biases are 0 and norms do nothing."""
    for module in network.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            module.weight.normal_(generator=generator)
        elif isinstance(module, Norm | nn.GroupNorm | nn.LayerNorm) and isinstance(weight, Tensor):
            weight.fill_(1)
        else:
            continue
        if isinstance(bias, Tensor):
            bias.zero_()


def before_pooling(network: Any, x: Tensor) -> Tensor:
    """Return a network's last features, those before global pooling where its backbone pools them to one pixel."""
    backbone = network.backbone
    segments = getattr(backbone, "segments", None)
    end = segments[-1] if segments else backbone  # pooling further up is part of a block
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for module in end.modules()
        if isinstance(module, nn.AdaptiveAvgPool2d)
    ]
    try:
        features = backbone.features(x)[-1]
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1] if seen else features


def drop_shortcuts(network: nn.Module) -> None:
    """Leave out the shortcuts of residual blocks, with what is projected on them."""
    for module in network.modules():
        if isinstance(module, Residual):
            module.added = False


def _no_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
