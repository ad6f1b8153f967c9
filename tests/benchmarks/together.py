"""What it brings to measure the candidates of an evolution together, against one by one; run by hand.

    OMP_NUM_THREADS=1 python tests/benchmarks/together.py [--spec FILE] [--trials N] [--set KEY=VALUE]… [--out DIR]

A run of the spec (a finished one in DIR is taken) trains a supernet and searches it; its trials are then measured again
in the order in which they were asked for: recalibrated, then validated. Decoded tensors, batch size and threads are the
same in all rows but the first. Seconds are those of the processor. A row's statistics (relative to the largest of their
norm) and predictions are compared with those of "one by one".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor, nn

from corenas.calibrate import Evaluation
from corenas.contracts import Rival, Stopped
from corenas.run.prepare import load_supernet, prepare
from corenas.run.spec import open_spec
from corenas.space import Arch
from corenas.store import Store

FEW = 10
"""How many archs data is decoded anew for."""
ROUND = BEST = 10
"""How many archs are asked for at once, and how many of the best are to stay the best where archs race."""


@define
class Watched:
    """A task that notes what is predicted, and the statistics it is predicted with; the time that takes is known."""

    task: Any
    norms: Sequence[nn.Module]
    statistics: list[list[Tensor]] = field(factory=list)
    predictions: list[Tensor] = field(factory=list)
    metrics: list[Any] = field(factory=list)
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def meter(self) -> Any:
        """A new meter: an arch's statistics are those that it is measured with from now on."""
        start = time.process_time()
        self.statistics.append([t.clone() for norm in self.norms for t in (norm.running_mean, norm.running_var)])
        self.predictions.append(torch.tensor([], dtype=torch.int64))
        self.seconds += time.process_time() - start
        return _Meter(self, self.task.meter())


@define
class _Meter:
    watched: Watched
    meter: Any

    def update(self, outputs: Any, batch: Any) -> None:
        self.meter.update(outputs, batch)
        start = time.process_time()
        found = self.watched.task.logits(outputs).argmax(1).cpu()
        self.watched.predictions[-1] = torch.cat([self.watched.predictions[-1], found])
        self.watched.seconds += time.process_time() - start

    def compute(self) -> Any:
        self.watched.metrics.append(self.meter.compute())
        return self.watched.metrics[-1]


Row = tuple[float, Watched]


def timed(evaluation: Evaluation, archs: Sequence[Arch], anew: bool = False) -> Row:
    """Return seconds an arch, and what was found; `anew` decodes data for each."""
    norms = [m for m in evaluation.supernet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    watched = Watched(evaluation.task, norms)
    evaluation = evolve(evaluation, task=watched)
    [*evaluation.images, *evaluation.split("valid")]  # decoded before the clock runs
    start = time.process_time()
    for arch in archs:
        (evolve(evaluation) if anew else evaluation)(arch)
    return (time.process_time() - start - watched.seconds) / len(archs), watched


def raced(evaluation: Evaluation, archs: Sequence[Arch]) -> tuple[float, list[int]]:
    """Return seconds an arch where archs race in rounds as those of a search do, and the numbers of the best."""
    evaluation = evolve(evaluation)
    [*evaluation.images, *evaluation._batches("valid", evaluation.batch_size, evaluation.task.splits["valid"], False)]
    start, found = time.process_time(), {}

    def ranked() -> list[int]:
        return sorted(found, key=lambda i: -found[i])[:BEST]

    for at in range(0, len(archs), ROUND):
        best = ranked()
        rival = Rival("top1", archs[best[-1]] if len(best) == BEST else None, 0.05 / BEST)
        for i in range(at, min(at + ROUND, len(archs))):
            metrics = evaluation.raced(archs[i], rival)
            if not isinstance(metrics, Stopped):
                found[i] = metrics["top1"]
    return (time.process_time() - start) / len(archs), ranked()


def unfused(row: Callable[[], Row], model: nn.Module) -> Row:
    """Measure while no norm is folded into its convolution: what is hooked is run as it stands."""
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        return row()
    finally:
        for hook in hooks:
            hook.remove()


def compared(found: Watched, wanted: Watched) -> tuple[float, int, int]:
    """Return the largest difference of statistics, how many predictions differ, and of how many."""
    pairs = zip(found.statistics, wanted.statistics, strict=False)
    error = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for p in pairs for a, b in zip(*p, strict=True)
    )
    pairs = [*zip(found.predictions, wanted.predictions, strict=False)]
    return error, sum(int((a != b).sum()) for a, b in pairs), sum(len(b) for _, b in pairs)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="spec/quickstart.toml")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch) / "run"
        settings = [f"--set={item}" for item in (*given.set, f"search.trials={given.trials}")]
        command = [sys.executable, "-m", "corenas", "run", given.spec, *settings, "--json", "--out", str(folder)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        prepared = prepare(open_spec(folder / "spec.toml")[0])
        supernet = load_supernet(prepared, folder)
        measured = Store(folder / "run.sqlite", readonly=True).trials()
        archs = [trial.arch for trial in measured if trial.metrics.keys() & prepared.task.metrics.keys()]
    together = prepared.evaluation(supernet)
    alone = evolve(together, shared=0)
    timed(alone, archs[:2])  # the first ones are slower
    rows = {
        "data decoded for each": unfused(lambda: timed(alone, archs[:FEW], anew=True), supernet),
        "one by one": unfused(lambda: timed(alone, archs), supernet),
        "batch norm folded": timed(alone, archs),
        "and leading segments": timed(together, archs),
    }
    racing, best = raced(together, archs)
    print(f"{len(archs)} archs, {torch.get_num_threads()} threads")
    print(f"{'':<24}{'archs/s':>9}{'times':>7}{'statistics':>12}{'predictions':>20}")
    seconds, wanted = rows["one by one"]
    for name, (own, found) in rows.items():
        error, other, of = compared(found, wanted)
        print(f"{name:<24}{1 / own:>9.2f}{seconds / own:>7.2f}{error:>12.1e}{f'{other} of {of:,}':>20}")
    tops = [number["top1"] for number in rows["one by one"][1].metrics]
    wanted_best = sorted(range(len(archs)), key=lambda i: -tops[i])[:BEST]
    same = sum(tops[i] >= tops[wanted_best[-1]] for i in best)
    print(f"{'and racing':<24}{1 / racing:>9.2f}{seconds / racing:>7.2f}{f'{same} of the best {len(best)}':>32}")


if __name__ == "__main__":
    main()
