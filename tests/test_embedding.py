"""The core in other people's code: their loop, accelerate's, their function; without spec, command line or run."""

import numpy as np
import pandas
import pytest
import torch
import toys
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from corenas.calibrate import recalibrate
from corenas.constrained import FeasibleSpace
from corenas.contracts import Problem
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export
from corenas.mutable import apply
from corenas.objectives import Constraint, Objective, Objectives
from corenas.plugins import load_catalogue
from corenas.search import search
from corenas.space import SearchSpace

TABLE = {"width": [4, 8, 12], "depth": [1, 2, 3], "block": {"kernel": [1, 3]}}
CATALOGUE = load_catalogue()


class MyNetwork(nn.Module):
    def __init__(self, space):
        super().__init__()
        tree = space.tree
        self.stem = toys.Conv(1, tree["width"], 3)
        blocks = [toys.Block(tree["width"], block["kernel"], norm=True) for block in tree["blocks"]]
        self.stage, self.head = toys.Depth(blocks, tree["depth"]), toys.Linear(tree["width"], 10)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


class MyTask:
    """What `recalibrate` needs of a task."""

    def forward(self, model, batch):
        return model(batch[0])


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(images[:1200], torch.tensor(labels[:1200])), (images[1200:], torch.tensor(labels[1200:]))


def test_a_loop_of_ones_own_trains_a_supernet_and_the_core_searches_it(digits):
    torch.manual_seed(0)
    space, rng, (valid, labels) = SearchSpace.from_table(TABLE), np.random.default_rng(0), digits[1]
    supernet = MyNetwork(space)
    cost = Cost(supernet, space, torch.empty(1, 1, 8, 8))
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.2, momentum=0.9)
    loader = DataLoader(digits[0], batch_size=60, shuffle=True, drop_last=True)
    for _ in range(12):
        for images, targets in loader:
            with apply(supernet.train(), space.sample(rng)):
                loss = nn.functional.cross_entropy(supernet(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(arch):
        with apply(supernet, arch):
            recalibrate(supernet, MyTask(), [digits[0][:300]])
            return {"top1": 100 * float((supernet(valid).argmax(1) == labels).float().mean())}

    objectives, small = Objectives((Objective("top1"),)), [Constraint("flops", high=60_000)]
    problem = Problem(FeasibleSpace(space, cost, small), objectives, budget=10)
    searcher = CATALOGUE.options("searchers", {"type": "evolution", "population": 4, "mutation": 2, "crossover": 1})
    trials = search(searcher.start(problem, rng), accuracy, problem.budget)
    best = objectives.best(trials, 1)[0]
    network = export(supernet.eval(), best.arch, valid[:1])

    assert all(cost.of([trial.arch])[0]["flops"] <= 60_000 for trial in trials)
    assert best.metrics["top1"] > 40
    assert sum(p.numel() for p in network.parameters()) == cost.of([best.arch])[0]["params"]


def test_a_supernet_trains_in_accelerates_loop(digits):
    from accelerate import Accelerator

    torch.manual_seed(0)
    space, rng = SearchSpace.from_table(TABLE), np.random.default_rng(0)
    supernet = MyNetwork(space)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(supernet, optimizer, DataLoader(digits[0], batch_size=60))
    losses = []
    for _ in range(8):
        for images, targets in loader:
            with accelerator.accumulate(model), apply(supernet, space.sample(rng)):
                loss = nn.functional.cross_entropy(model(images), targets)
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize("name", CATALOGUE.names("searchers"))
def test_any_searcher_drives_a_function_of_ones_own(name):
    space = SearchSpace.from_table({"x": {"type": "int", "low": 0, "high": 40}, "y": [1, 2, 3], "on": ["yes", "no"]})
    problem = Problem(space, Objectives((Objective("gain"),)), budget=60)
    searcher = CATALOGUE.options("searchers", name).start(problem, np.random.default_rng(0))
    trials = search(searcher, lambda arch: {"gain": arch["x"] * arch["y"] - 5 * (arch["on"] == "no")}, 60)
    best = problem.objectives.best(trials, 1)[0]

    assert len(trials) == 60
    assert best.metrics["gain"] >= 90


def test_trials_become_a_pandas_frame_in_one_line():
    space = SearchSpace.from_table(TABLE)
    problem = Problem(space, Objectives((Objective("size"),)), budget=8)
    searcher = CATALOGUE.options("searchers", "random").start(problem, np.random.default_rng(0))
    trials = search(searcher, lambda arch: {"size": arch["width"] * arch["depth"]}, 8)

    frame = pandas.DataFrame(trial.row for trial in trials)

    assert (frame["size"] == frame["width"] * frame["depth"]).all()
    assert [*frame.columns] == [*space.keys, "size", "state", "seconds", "fidelity"]
    assert len(frame) == 8


def test_a_choice_that_a_variable_does_not_have_is_told_where_an_arch_is_made():
    with pytest.raises(UserError, match=r"16 is none of the choices 4, 8, 12"):
        SearchSpace.from_table(TABLE).arch({"width": 16})
