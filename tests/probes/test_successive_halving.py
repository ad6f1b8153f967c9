"""A searcher that measures many archs a little, and the best of them more: successive halving."""

import numpy as np
import pytest
import toys

from corenas.contracts import Problem, Proposal
from corenas.objectives import Objective, Objectives, Trial
from corenas.search import run_search
from corenas.space import Arch
from corenas.store import Store


class Halving:  # Jamieson and Talwalkar 2016, arXiv:1502.07943, brackets of nine archs
    def __init__(self, problem, rng):
        self.problem, self.rng, self.rung, self.fidelity, self.told = problem, rng, [], 1 / 9, []

    def ask(self, n):
        if not self.rung:
            best = self.problem.objectives.best(self.told, len(self.told) // 3)  # the failed and infeasible are none
            self.fidelity = min(1.0, 3 * self.fidelity) if best and self.fidelity < 1 else 1 / 9
            new = [self.problem.space.sample(self.rng) for _ in range(9)]
            self.rung, self.told = [trial.arch for trial in best] if self.fidelity > 1 / 9 else new, []
        asked, self.rung = self.rung[:n], self.rung[n:]
        return [Proposal(arch, self.fidelity) for arch in dict.fromkeys(asked)]

    def tell(self, trials):
        assert all(trial.fidelity == self.fidelity for trial in trials)
        self.told += trials

    def state_dict(self):
        rung, told = [dict(arch) for arch in self.rung], [trial.to_json() for trial in self.told]
        return {"rung": rung, "fidelity": self.fidelity, "told": told, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.rung, self.fidelity = [Arch(a) for a in state["rung"]], state["fidelity"]
        self.told = [Trial.from_json(t) for t in state["told"]]
        self.rng.bit_generator.state = state["rng"]


def measure(arch, fidelity=1.0):
    if arch["op"] == "pool":
        return Trial(arch, state="failed", error="no pooling here", fidelity=fidelity)
    if arch["width"] == 8 and arch["depth"] == 3:
        return Trial(arch, {"size": 24.0}, "infeasible", fidelity=fidelity)
    noise = (int(arch.digest, 16) % 100 / 100 - 0.5) * (1 - fidelity)
    return Trial(arch, {"score": arch["width"] * arch["depth"] + noise}, fidelity=fidelity)


def run(store=None, stop=None, budget=12):
    problem = Problem(toys.make_space(), Objectives((Objective("score"),)), budget)
    left = iter(range(stop or 10**6))

    def watched(arch, fidelity=1.0):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measure(arch, fidelity)

    searcher = Halving(problem, np.random.default_rng(0))
    return run_search(
        searcher, watched, budget, batch=4, space=problem.space, store=store, objectives=problem.objectives
    )


def test_rungs_of_all_fidelities_are_asked_told_and_paid_for_as_shares():
    trials = run()
    assert {round(trial.fidelity, 3) for trial in trials} == {0.111, 0.333, 1.0}
    assert {trial.state for trial in trials} == {"done", "failed", "infeasible"}
    assert 11.999 < sum(trial.fidelity for trial in trials) <= 12.5
    assert len(trials) > 30
    assert len({(trial.arch, trial.fidelity) for trial in trials}) == len(trials)
    first, last = ([t.metrics["score"] for t in trials if t.ok and t.fidelity == f] for f in (1 / 9, 1.0))
    assert np.mean(last) > np.mean(first)


@pytest.mark.parametrize("stop", [1, 9, 20])
def test_a_killed_search_ends_with_the_same_trials(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(Store(tmp_path / "s.sqlite"), stop)
    assert run(Store(tmp_path / "s.sqlite")) == run()
