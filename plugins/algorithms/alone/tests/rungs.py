"""A searcher that promotes the better half, from a quarter of the effort to all of it."""

from attrs import frozen

from corenas.contracts import Proposal
from corenas.hookspecs import hookimpl


@frozen
class Rungs:
    """Four archs at a quarter, two at a half, one at the whole effort."""

    def start(self, problem, rng):
        return Live(problem, [problem.space.sample(rng) for _ in range(4)])


class Live:
    def __init__(self, problem, archs):
        self.problem, self.archs, self.fidelity = problem, archs, 0.25

    def ask(self, n):
        return [Proposal(arch, self.fidelity) for arch in self.archs] if self.fidelity <= 1 else []

    def tell(self, trials):
        ranked = self.problem.objectives.best(trials, len(trials) // 2)
        self.archs, self.fidelity = [trial.arch for trial in ranked], self.fidelity * 2

    def state_dict(self):
        return {"archs": [dict(arch) for arch in self.archs], "fidelity": self.fidelity}

    def load_state_dict(self, state):
        from corenas.space import Arch

        self.archs, self.fidelity = [Arch(arch) for arch in state["archs"]], state["fidelity"]


@hookimpl
def corenas_searchers():
    return {"rungs": Rungs}
