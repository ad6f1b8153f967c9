"""What slicing costs: a supernet under an arch against the exported network, run by hand.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/slicing.py [--rounds N] [--images BATCHxSIDE]… [CASE …]

Paired: each round times both, in alternating order; printed is the median of the rounds' ratios of processor time. For
each backbone its largest and its smallest arch, forward in evaluation without gradient, forward-backward in training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.backbones import AllFeatures

IMAGENET = ((8, 224), (32, 64), (64, 32))


@frozen
class Case:
    """A supernet and the images that it is timed on.

    settings: (batch, side)
    """

    backbone: str
    space: str
    options: Mapping[str, Any] = field(factory=dict)
    narrow: Mapping[str, Any] = field(factory=dict)
    settings: tuple[tuple[int, int], ...] = IMAGENET


CASES = {
    "mobilenetv3": Case("mobilenetv3", "ofa-mobilenetv3", narrow={"resolution": [224]}),
    "mobilenetv3, kernel transforms": Case(
        "mobilenetv3", "ofa-mobilenetv3", {"transforms": True}, {"resolution": [224]}
    ),
    "attentivenas": Case("mobilenetv3", "attentivenas", narrow={"resolution": [224]}),
    "fairnas": Case("mobilenetv3", "fairnas"),
    "shufflenetv2": Case("shufflenetv2", "spos-shufflenetv2"),
    "shufflenetv2, channels": Case("shufflenetv2", "spos-shufflenetv2-channels"),
    "resnet": Case("resnet", "ofa-resnet50d", narrow={"resolution": [224]}),
    "genet": Case("genet", "genet", narrow={"resolution": [224]}),
    "zennet": Case("zennet", "zennet-cifar", narrow={"stages.*.width": [64, 128], "stages.*.bottleneck": [16, 32]},
                   settings=((32, 32),)),
    "darts": Case("darts", "darts", settings=((8, 32),)),
    "vit": Case("vit", "autoformer-tiny", settings=((4, 224),)),
}  # fmt: skip


def ratio(run: Callable[[nn.Module], None], ours: nn.Module, theirs: nn.Module, rounds: int) -> tuple[float, float]:
    """Median ratio of processor times, and the median time of the second in milliseconds."""
    ratios, times = [], []
    for i in range(-2, rounds):
        spent = {}
        for model in (ours, theirs) if i % 2 else (theirs, ours):
            model.zero_grad()  # before the clock: a supernet has the parameters of all its candidates
            start = time.process_time()
            run(model)
            spent[model] = time.process_time() - start
        if i >= 0:  # the first two warm up
            ratios.append(spent[ours] / spent[theirs])
            times.append(spent[theirs])
    return statistics.median(ratios), 1e3 * statistics.median(times)


def forward(images: Tensor, model: nn.Module) -> None:
    with torch.no_grad():
        model(images)


def forward_backward(images: Tensor, model: nn.Module) -> None:
    sum(feature.sum() for feature in model(images)).backward()  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", action="append", default=[], help="8x224, for instance, in place of a case's own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = load_catalogue()
    print(f"{'case':<32}{'arch':<10}{'batch':>6}{'size':>6}{'mode':>18}{'ratio':>8}{'exported, ms':>14}")
    for name in given.cases or CASES:
        case = CASES[name]
        if given.images:
            case = evolve(case, settings=[tuple(map(int, images.split("x"))) for images in given.images])
        space = SearchSpace.from_table(tomli.loads(Path(f"spec/space/{case.space}.toml").read_text())).narrow(
            case.narrow
        )
        backbone = catalogue.find("backbones", case.backbone).cls(**case.options)
        supernet = Supernet(backbone.build(space), AllFeatures()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if hasattr(supernet.backbone, "resize"):
            supernet.backbone.resize = nn.Identity()  # images come in the size that is timed
        for label, arch in (("largest", space.largest()), ("smallest", space.smallest())):
            plain = export_subnet(supernet, arch, torch.zeros(1, 3, *case.settings[-1][1:] * 2))
            plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with apply(supernet, arch):
                for batch, size in case.settings:
                    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
                    for mode, run in (("forward", forward), ("forward-backward", forward_backward)):
                        for model in (supernet, plain):
                            model.train(mode != "forward")
                        found, spent = ratio(partial(run, images), supernet, plain, given.rounds)
                        row = f"{label:<10}{batch:>6}{size:>6}{mode:>18}{found:>8.3f}{spent:>14.1f}"
                        print(f"{name:<32}{row}", flush=True)


if __name__ == "__main__":
    main()
