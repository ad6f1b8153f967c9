"""What an optimizer asks, made an arch that obeys the constraints; and all it was told, so that it is told again."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import nevergrad as ng
import numpy as np

from corenas.contracts import Json, Problem
from corenas.errors import UserError, did_you_mean
from corenas.objectives import Trial
from corenas.space import Arch, Codes, SearchSpace, unseen

if TYPE_CHECKING:
    from corenas_searcher_nevergrad import Nevergrad

Loss: TypeAlias = float | list[float]

_REPAIRS = 64
"""So many archs lie between one outside the constraints and one inside; the nearest one that is inside is taken."""
_MUTANTS = 16
_KNOWN = 20
"""After so many archs in a row that are known already, a mutant of the last one is asked."""


class NevergradSearch:
    """An optimizer with the list of all that was asked of it and told to it, by which it is made again.

    log: in order, None for an `ask`, [number of that ask, loss] for a `tell`, [codes, loss] for what was measured
        elsewhere
    candidates: number of an ask -> what the optimizer made, as long as it is untold
    waiting: digest of an arch that was asked -> the asks that it answers
    losses: digest -> what was told
    alone: whether the optimizer wants to hear of each arch before it asks the next
    """

    def __init__(self, options: Nevergrad, problem: Problem, rng: np.random.Generator) -> None:
        self.several = problem.objectives.pareto and len(problem.objectives.objectives) > 1
        self.name = options.optimizer or ("TwoPointsDE" if self.several else "DiscreteLenglerOnePlusOne")
        if self.name not in ng.optimizers.registry:
            hint = did_you_mean(self.name, ng.optimizers.registry, "nevergrad's")
            text = f"nevergrad has no optimizer {self.name!r}"
            raise UserError(text, key=("searcher", "optimizer"), hint=hint)
        self.options, self.problem, self.rng = options, problem, rng
        self.space = SearchSpace(problem.space.variables)
        self.whole = [i for i, v in enumerate(self.space.variables) if not v.continuous and len(v.choices) > 1]
        self.shares = [i for i, v in enumerate(self.space.variables) if v.continuous and len(v.choices) > 1]
        self.seed = int(rng.integers(1 << 31))
        self.seen: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        """Make the optimizer anew."""
        self.log: list[Any] = []
        self.asks = 0
        self.alone = False
        self.candidates: dict[int, Any] = {}
        self.waiting: dict[str, list[int]] = {}
        self.losses: dict[str, Loss] = {}
        self.optimizer = None
        if not self.whole and not self.shares:
            return
        with self._seeded():
            parts = []
            if self.whole:
                most = np.array([len(self.space.variables[at].choices) - 1.0 for at in self.whole])
                array = ng.p.Array(init=most / 2, lower=np.full(len(most), -0.499), upper=most + 0.499)
                parts.append(array.set_integer_casting())
            if self.shares:
                n = len(self.shares)
                parts.append(ng.p.Array(init=np.full(n, 0.5), lower=np.zeros(n), upper=np.ones(n)))
            parameter = parts[0] if len(parts) == 1 else ng.p.Tuple(*parts)
            parameter.random_state = np.random.RandomState(self.seed)
            made = ng.optimizers.registry[self.name]
            self.alone = bool(getattr(made, "no_parallelization", False))
            workers = 1 if self.alone else self.options.workers
            self.optimizer = made(parameter, budget=self.problem.budget, num_workers=workers)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Give optimizers that draw from global generators the same numbers at the same place of the log, each time."""
        before = random.getstate(), np.random.get_state()
        seed = (self.seed + 7919 * len(self.log)) % (1 << 32)
        random.seed(seed)
        np.random.seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings that it finds inefficient
                yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def ask(self, n: int) -> list[Arch]:
        """Return up to n new archs: what the optimizer asks, or what is nearest to it inside the constraints.

        One at a time, and none while that is untold, where the optimizer wants it so.
        """
        archs: list[Arch] = []
        if self.alone:
            n = min(n, 0 if self.waiting else 1)
        known = 0
        while len(archs) < n and known <= _KNOWN:
            if self.optimizer is None:
                archs += self._new(lambda: self.problem.space.sample(self.rng), n - len(archs))
                break
            number, codes = self._asked()
            (arch,) = self.space.decode(self._inside(codes))
            if arch.digest in self.losses:
                self._tell(number, self.losses[arch.digest])
                known += 1
            elif arch.digest in self.waiting or arch.digest in self.seen:
                known += 1
            if arch.digest in self.seen and known > _KNOWN:
                found = self._mutant(arch)
                known = 0 if found else known
                archs += found
                for made in found:
                    self.waiting[made.digest] = []
            elif arch.digest in self.waiting:
                self.waiting[arch.digest].append(number)
            elif arch.digest not in self.seen:
                self.seen.add(arch.digest)
                self.waiting[arch.digest] = [number]
                archs.append(arch)
                known = 0
        return archs

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tell the optimizer what came of its archs; what failed is worse than all that did not."""
        for trial in trials:
            digest = trial.arch.digest
            self.seen.add(digest)
            if digest in self.losses:
                continue
            loss = self.losses[digest] = self._loss(trial)
            numbers = self.waiting.pop(digest, [])
            for number in numbers:
                self._tell(number, loss)
            if not numbers and self.optimizer is not None:
                self._tell_foreign(self.space.encode([trial.arch])[0].tolist(), loss)

    def state_dict(self) -> dict[str, Json]:
        """Return the log; the optimizer is made again from it."""
        return {
            "seed": self.seed,
            "log": [*self.log],
            "waiting": {digest: [*numbers] for digest, numbers in self.waiting.items()},
            "losses": dict(self.losses),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Ask and tell a new optimizer all that the former one was asked and told."""
        self.seed = state["seed"]
        self._begin()
        for entry in state["log"]:
            if entry is None:
                self._asked()
            elif isinstance(entry[0], list):
                self._tell_foreign(*entry)
            else:
                self._tell(*entry)
        self.waiting = {digest: [*numbers] for digest, numbers in state["waiting"].items()}
        self.losses, self.seen = dict(state["losses"]), set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _asked(self) -> tuple[int, Codes]:
        """Return the number of a new `ask` and the codes of what the optimizer made."""
        assert self.optimizer is not None
        with self._seeded():
            candidate = self.optimizer.ask()
            value = candidate.value
        self.log.append(None)
        number, self.asks = self.asks, self.asks + 1
        self.candidates[number] = candidate
        codes = self.space.encode([self.space.default()])
        parts = value if self.whole and self.shares else (value,)
        for columns, part in zip(filter(None, (self.whole, self.shares)), parts, strict=True):
            codes[0, columns] = part
        return number, codes

    def _tell(self, number: int, loss: Loss) -> None:
        assert self.optimizer is not None
        with self._seeded():
            self.optimizer.tell(self.candidates.pop(number), loss)
        self.log.append([number, loss])

    def _tell_foreign(self, codes: list[float], loss: Loss) -> None:
        """Tell what was not asked, if the optimizer listens."""
        assert self.optimizer is not None
        row = np.array(codes)
        values = [row[columns] for columns in (self.whole, self.shares) if columns]
        with self._seeded():
            value = values[0] if len(values) == 1 else tuple(values)
            with suppress(ng.errors.TellNotAskedNotSupportedError):
                self.optimizer.tell(self.optimizer.parametrization.spawn_child(new_value=value), loss)
        self.log.append([codes, loss])

    def _loss(self, trial: Trial) -> Loss:
        objectives = self.problem.objectives
        gains = [math.nan]
        if trial.ok:
            gains = [goal.gain(trial.metrics) for goal in objectives.objectives]
            gains = gains if self.several else [objectives.score(trial)]
        if all(map(math.isfinite, gains)):
            return [-gain for gain in gains] if self.several else -gains[0]
        told = np.array([*self.losses.values()], float)
        worst = told.max(axis=0) + np.ptp(told, axis=0) if len(told) else np.zeros(len(objectives.objectives))
        return worst.tolist() if self.several else float(np.max(worst))

    def _inside(self, codes: Codes) -> Codes:
        """Return the arch of some codes, or one that obeys the constraints and is near it, by as few choices as found.

        It is on the way to the nearest of some mutants; of a region that breeds well these are near.
        """
        region = self.problem.space
        admitted = region.admit(codes)
        if len(admitted):
            return admitted[:1]
        codes = self.space.canonical(codes)
        mutants = region.mutated(codes.repeat(_MUTANTS, axis=0), min(0.5, 1 / codes.shape[1]), self.rng)
        other = mutants[[(mutants != codes).sum(axis=1).argmin()]]
        kept = self.rng.random((_REPAIRS, codes.shape[1])) < np.linspace(1, 0, _REPAIRS)[:, None]
        admitted = region.admit(np.where(kept, codes, other))
        return admitted[:1] if len(admitted) else other

    def _mutant(self, arch: Arch) -> list[Arch]:
        space, prob = self.problem.space, min(1.0, 2 / len(self.space.variables))
        return self._new(lambda: space.mutate(arch, prob, self.rng), 1) or self._new(lambda: space.sample(self.rng), 1)

    def _new(self, draw: Any, n: int) -> list[Arch]:
        return unseen(draw, n, self.seen, patience=200)
