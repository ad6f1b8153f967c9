"""What slicing costs: a supernet under an arch against the exported network, run by hand.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/slicing.py [ROUNDS]

Paired: each round times both, in alternating order; printed is the median of the rounds' ratios of processor time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from corenas.export import export
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.prepare import prepare
from corenas.spec import load_spec

SETTINGS = ((8, 224), (32, 64), (64, 32))


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median ratio of processor times, and the median time of the second in milliseconds."""
    ratios, times = [], []
    for run in (ours, theirs, ours, theirs):
        run()
    for i in range(rounds):
        spent = {}
        for run in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.process_time()
            run()
            spent[run] = time.process_time() - start
        ratios.append(spent[ours] / spent[theirs])
        times.append(spent[theirs])
    return statistics.median(ratios), 1e3 * statistics.median(times)


def forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def forward_backward(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(images).sum().backward()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    torch.set_num_threads(1)
    catalogue = load_catalogue()
    spec, _ = load_spec("spec/ofa-mobilenetv3.toml", catalogue, ["space.narrow.resolution=[224]"])
    prepared = prepare(spec, data=False)
    supernet = prepared.supernet.to(memory_format=torch.channels_last)
    supernet.backbone.resize = nn.Identity()  # images come in the size that is timed
    print(f"{'arch':<10}{'batch':>6}{'size':>6}{'mode':>18}{'ratio':>8}{'exported, ms':>14}")
    for name, arch in (("default", spec.space.default()), ("smallest", spec.space.smallest())):
        plain = export(supernet, arch, torch.zeros(1, 3, 64, 64)).to(memory_format=torch.channels_last)
        with apply(supernet, arch):
            for batch, size in SETTINGS:
                images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
                for mode, run in (("forward", forward), ("forward-backward", forward_backward)):
                    for model in (supernet, plain):
                        model.train(mode != "forward")
                    ours, theirs = partial(run, supernet, images), partial(run, plain, images)
                    found, spent = ratio(ours, theirs, rounds)
                    print(f"{name:<10}{batch:>6}{size:>6}{mode:>18}{found:>8.3f}{spent:>14.1f}", flush=True)


if __name__ == "__main__":
    main()
