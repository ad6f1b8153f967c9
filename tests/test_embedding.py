"""The core in other people's code: their loop, Lightning's, Accelerate's; without spec, command line or run."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

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
from corenas.export import export_subnet
from corenas.loading import Stream
from corenas.mutable import apply
from corenas.objectives import Constraint, Objective, Objectives
from corenas.plugins import load_catalogue
from corenas.search import run_search
from corenas.space import SearchSpace
from corenas.train import run_training

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
    trials = run_search(searcher.start(problem, rng), accuracy, problem.budget)
    best = objectives.best(trials, 1)[0]
    network = export_subnet(supernet.eval(), best.arch, valid[:1])

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


# -- training: README's loops over a live phase -----------------------------------------------------------------------

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FRAGMENTS = [part.split("```")[0] for part in README.split("```python\n")[1:]]
SETUP, *LOOPS = [fragment for fragment in FRAGMENTS if "live" in fragment.lower()]
METHODS = {"uniform": "spos", "sandwich": "bignas"}


class Digits(MyTask):
    """What training needs of a task."""

    def __init__(self, data):
        self.data, self.splits = data, {"train": len(data)}

    def dataset(self, split, augmented):
        return self.data

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    def logits(self, outputs):
        return outputs


class Order:
    """Batches in the order of `run_training`, another one each epoch."""

    def __init__(self, task, batch_size):
        self.stream, self.epochs = Stream(task, "train", batch_size, seed=0), itertools.count()

    def __len__(self):
        return self.stream.steps

    def __iter__(self):
        return ([i for _, i in batch] for batch in self.stream.order(next(self.epochs)))


def names_of_readme(mutator, data):
    """All that README has defined before a live phase is stepped."""
    torch.manual_seed(0)
    space, task = SearchSpace.from_table(TABLE), Digits(data)
    supernet = MyNetwork(space)
    cost = Cost(supernet, space, torch.empty(1, 1, 8, 8))
    loader = DataLoader(data, batch_sampler=Order(task, 60))
    names = {"space": space, "supernet": supernet, "task": task, "cost": cost, "loader": loader}
    names |= {"catalogue": CATALOGUE, "torch": torch}
    exec(SETUP.replace("sandwich", mutator).replace("bignas", METHODS[mutator]), names)
    return SimpleNamespace(**names)


@pytest.fixture
def few(digits):
    return TensorDataset(*digits[0][:240])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("loop", LOOPS, ids=["plain", "lightning", "accelerate"])
@pytest.mark.parametrize("mutator", METHODS)
def test_a_supernet_ends_with_the_weights_of_run_training_in_anyones_loop(mutator, loop, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes logs
    theirs = names_of_readme(mutator, few)
    average = run_training(theirs.trainer, theirs.supernet, theirs.task, theirs.mutator, theirs.cost)

    ours = names_of_readme(mutator, few)
    before = copy.deepcopy(ours.supernet.state_dict())
    names = {**vars(ours)}
    exec(
        loop.replace("Trainer(", 'Trainer(accelerator="cpu", ').replace("Accelerator()", "Accelerator(cpu=True)"), names
    )
    live = names["module"].live if "module" in names else names["live"]

    assert live.done == live.index == 3 * 4
    assert toys.same(ours.supernet.state_dict(), theirs.supernet.state_dict())
    assert toys.same(live.average.state_dict(), average.state_dict())
    assert not toys.same(live.average.state_dict(), ours.supernet.state_dict())
    assert not toys.same(ours.supernet.state_dict(), before)


def test_a_live_phase_goes_on_from_its_state(few, tmp_path):
    whole, first, second = (names_of_readme("sandwich", few) for _ in range(3))
    batches = [*whole.loader, *whole.loader]
    live, cut = whole.start(), first.start()
    for batch in batches:
        live.step(batch)
    for batch in batches[:3]:
        cut.step(batch)
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    resumed = second.start(resumed=True)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[3:]:
        resumed.step(batch)
    assert toys.same(resumed.state_dict(), live.state_dict())


def test_a_batch_that_is_not_made_of_tensors_of_one_length_is_cut_by_its_owner(digits):
    live = names_of_readme("uniform", digits[0]).start()
    images, labels = digits[0][:60]
    with pytest.raises(UserError, match="cannot cut this batch"):
        live.step((images, labels, ["a name"] * 60))
    with pytest.raises(UserError, match="1 images cannot be cut into 2 parts"):
        live.step((images[:1], labels[:1]))
    assert live.done == 0
    parts = [((images[:20], labels[:20], "a"), 1 / 3), ((images[20:], labels[20:], "b"), 2 / 3)]
    assert live.step_parts(parts)["loss"] > 0


def test_a_state_of_another_phase_or_other_settings_is_told(digits):
    start = names_of_readme("uniform", digits[0]).start
    first, second = (start(number=number) for number in (0, 1))
    with pytest.raises(ValueError, match="of phase 2, not 1"):
        first.load_state_dict(second.state_dict())
    state = first.state_dict()
    del state["average"]
    with pytest.raises(ValueError, match="average: KeyError"):
        first.load_state_dict(state)


@pytest.mark.parametrize("name", CATALOGUE.names("searchers"))
def test_any_searcher_drives_a_function_of_ones_own(name):
    space = SearchSpace.from_table({"x": {"type": "int", "low": 0, "high": 40}, "y": [1, 2, 3], "on": ["yes", "no"]})
    problem = Problem(space, Objectives((Objective("gain"),)), budget=60)
    searcher = CATALOGUE.options("searchers", name).start(problem, np.random.default_rng(0))

    def gain(arch, fidelity=1.0):  # some measure with less effort first
        return {"gain": arch["x"] * arch["y"] - 5 * (arch["on"] == "no")}

    trials = run_search(searcher, gain, 60)
    best = problem.objectives.best([trial for trial in trials if trial.fidelity == 1], 1)[0]

    assert 59 < sum(trial.fidelity for trial in trials) < 61  # the last of them may go beyond
    assert best.metrics["gain"] >= 90


def test_trials_become_a_pandas_frame_in_one_line():
    space = SearchSpace.from_table(TABLE)
    problem = Problem(space, Objectives((Objective("size"),)), budget=8)
    searcher = CATALOGUE.options("searchers", "random").start(problem, np.random.default_rng(0))
    trials = run_search(searcher, lambda arch: {"size": arch["width"] * arch["depth"]}, 8)

    frame = pandas.DataFrame(trial.row for trial in trials)

    assert (frame["size"] == frame["width"] * frame["depth"]).all()
    assert [*frame.columns] == [*space.keys, "size", "state", "seconds", "fidelity"]
    assert len(frame) == 8


def test_a_choice_that_a_variable_does_not_have_is_told_where_an_arch_is_made():
    with pytest.raises(UserError, match=r"16 is none of the choices 4, 8, 12"):
        SearchSpace.from_table(TABLE).arch({"width": 16})
