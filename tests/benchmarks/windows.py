"""How many archs a second are drawn, mutated and crossed inside narrow windows of costs; run by hand.

The seconds are those of the processor, on one thread. Windows: a thousandth of the space in the middle of its flops;
AttentiveNAS's 400 to 410 million; 2% around a network's flops and 2% around its params together.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/windows.py [--archs N] [--spaces NAME …]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tomli
import torch
from torch import nn

from corenas.constrained import FeasibleSpace
from corenas.cost import Cost
from corenas.objectives import Constraint
from corenas.plugins import load_catalogue
from corenas.space import Codes, SearchSpace

SPACES = {
    "ofa-mobilenetv3": "mobilenetv3",
    "attentivenas": "mobilenetv3",
    "bignas": "mobilenetv3",
    "ofa-resnet50d": "resnet",
    "spos-shufflenetv2-channels": "shufflenetv2",
    "genet": "genet",
    "vit": "vit",
    "darts": "darts",
}


class Body(nn.Module):
    """A backbone as what is called."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return its features."""
        return self.backbone.features(x)


def problem(name: str) -> tuple[SearchSpace, Cost]:
    """Return a space of a paper and what its archs cost."""
    path = Path(__file__).parents[2] / "spec" / "space" / f"{name}.toml"
    space = SearchSpace.from_table(tomli.loads(path.read_text(encoding="utf-8")))
    with torch.device("meta"):
        backbone = load_catalogue().find("backbones", SPACES[name]).cls().build(space)
    return space, Cost(Body(backbone), space, torch.empty(1, 3, 224, 224, device="meta"))


def windows(space: SearchSpace, cost: Cost) -> list[list[Constraint]]:
    """Return the windows of a space."""
    costs = cost(space.draw(np.random.default_rng(0), 100_000))
    low, high = np.quantile(costs["flops"], [0.5, 0.501])
    middle = np.argsort(costs["flops"])[len(costs["flops"]) // 2]
    around = [
        Constraint(metric, 0.98 * costs[metric][middle], 1.02 * costs[metric][middle]) for metric in ("flops", "params")
    ]
    found = [[Constraint("flops", float(low), float(high))], around]
    wanted = Constraint("flops", 400e6, 410e6)
    return [*found, [wanted]] if costs["flops"].min() < wanted.low and costs["flops"].max() > wanted.high else found


def per_second(work: Callable[[], Codes]) -> tuple[float, Codes]:
    """Return how many archs a second something gives, and which."""
    start = time.process_time()
    codes = work()
    return len(codes) / (time.process_time() - start), codes


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each window."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, default=50_000)
    parser.add_argument("--spaces", nargs="+", default=[*SPACES])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'space':28}{'share':>9}{'drawn/s':>10}{'mutated/s':>10}{'crossed/s':>10}{'set-up s':>10}  window")
    for name in options.spaces:
        space, cost = problem(name)
        for constraints in windows(space, cost):
            rng, start = np.random.default_rng(0), time.process_time()
            region = FeasibleSpace(space, cost, constraints)
            seconds = time.process_time() - start
            drawn, codes = per_second(lambda region=region, rng=rng: region.draw(rng, options.archs))
            mutated, _ = per_second(lambda region=region, rng=rng, codes=codes: region.mutated(codes, 0.1, rng))
            crossed, _ = per_second(lambda region=region, rng=rng, codes=codes: region.crossed(codes, codes[::-1], rng))
            rates = f"{drawn:10,.0f}{mutated:10,.0f}{crossed:10,.0f}"
            print(f"{name:28}{region.share:9.2%}{rates}{seconds:10.2f}  {' and '.join(map(str, constraints))}")


if __name__ == "__main__":
    main()
