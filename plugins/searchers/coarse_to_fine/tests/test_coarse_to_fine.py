import itertools
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Problem
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, archs, drive, large_space, learning_searcher_checks, simple_problem
from corenas_searcher_coarse_to_fine import BIGNAS, CoarseToFine, Scale

STAGES = [
    {"width": [8, 16], "depth": [1, 2, 3, 4], "kernel": [3, 5]},
    {"width": [24, 28, 32], "depth": [1, 2, 3, 4, 5, 6, 7], "kernel": [3, 5, 7]},
    {"width": 64, "depth": [2, 4, 6, 8], "kernel": [5, 3]},
]
SPACE = SearchSpace.from_table({"resolution": [192, 224, 256, 288, 320], "act": ["relu", "swish"], "stages": STAGES})


@pytest.mark.parametrize("check", learning_searcher_checks)
@pytest.mark.parametrize("searcher", [CoarseToFine(), CoarseToFine((), 0.02, 3, 0.3)])
def test_conforms(searcher, check):
    check(searcher)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_coarse_to_fine")


def grid_of(space, budget=1000, **options):
    problem = Problem(space, Objectives((Objective("gain"),)), budget)
    search = CoarseToFine(**options).start(problem, np.random.default_rng(0))
    return search.ask(budget)


def test_the_grid_is_the_papers():
    """Five resolutions, four depths, two widths, four kernel sizes by stages: each whole network scaled together."""
    grid = grid_of(SPACE)
    assert len(grid) == len({*grid}) == 5 * 4 * 2 * 4
    assert {arch["act"] for arch in grid} == {"relu"}

    def seen(*keys):
        return {tuple(arch[key] for key in keys) for arch in grid}

    assert seen("resolution") == {(192,), (224,), (256,), (288,), (320,)}
    assert seen("stages.0.depth", "stages.1.depth", "stages.2.depth") == {(1, 1, 2), (2, 3, 4), (3, 5, 6), (4, 7, 8)}
    assert seen("stages.0.width", "stages.1.width") == {(8, 24), (16, 32)}
    kernels = {(3, 3, 3), (3, 3, 5), (3, 7, 5), (5, 7, 5)}
    assert seen("stages.0.kernel", "stages.1.kernel", "stages.2.kernel") == kernels


def test_a_grid_takes_its_share_of_the_trials_and_is_thinned_out_evenly():
    grid, whole = grid_of(SPACE, 100, coarse=0.4), grid_of(SPACE)
    assert len(grid) == 40
    places = [whole.index(arch) for arch in grid]
    assert (places[0], places[-1]) == (0, 159)
    assert {b - a for a, b in itertools.pairwise(places)} == {4, 5}
    huge = grid_of(SearchSpace.from_table({"w": [{"width": [*range(1, 9)]}] * 12}), 500,
                   scales=tuple(Scale((f"w.{i}.width",), 8) for i in range(12)))  # fmt: skip
    assert len(huge) == 250


class Window:
    """Part of a space: archs whose codes sum up to no more than a limit."""

    def __init__(self, space, most):
        self.space, self.most, self.variables = space, most, space.variables

    def admit(self, codes):
        return codes[codes.sum(axis=1) <= self.most]

    def sample(self, rng):
        return self.mutate(self.space.sample(rng), 0.5, rng)

    def mutate(self, arch, prob, rng):
        codes = self.space.mutated(np.repeat(self.space.encode([arch]), 500, axis=0), prob, rng)
        return self.space.decode(self.admit(codes)[:1])[0]


def test_only_what_obeys_the_constraints_is_asked():
    space = SearchSpace.from_table({"stages": STAGES})
    window = Window(space, 12)
    problem = Problem(window, Objectives((Objective("gain"),)), 60)
    told = drive(CoarseToFine().start(problem, np.random.default_rng(0)), problem, additive(space))
    assert len(told) == 60
    assert (space.encode(archs(told)).sum(axis=1) <= 12).all()


def test_mutants_are_those_of_the_best_and_in_pareto_mode_of_the_whole_front():
    space = large_space()
    problem = simple_problem(budget=400, pareto=True)
    search = CoarseToFine(parents=2).start(problem, np.random.default_rng(0))
    measure = additive(space)
    told = drive(search, problem, measure, rounds=100)
    front = problem.objectives.front(told)
    assert len(front) > 10
    assert {trial.arch for trial in search.best} == {trial.arch for trial in front}


def test_the_grid_is_told_before_anything_is_mutated():
    problem, measure = simple_problem(budget=100), additive(large_space())
    search = CoarseToFine((Scale(("width.*",), 4), Scale(("depth",), 3))).start(problem, np.random.default_rng(0))
    asked = search.ask(100)
    assert len(asked) == 12
    assert search.ask(5) == []
    search.tell([Trial(arch, state="failed", error="no luck") for arch in asked[:5]])
    assert search.ask(5) == []
    search.tell([measure(arch) for arch in asked[5:]])
    assert len(search.ask(5)) == 5


def test_a_scale_that_fits_nothing_is_refused():
    with pytest.raises(UserError, match="no number is called so") as caught:
        grid_of(SPACE, scales=(BIGNAS[0], Scale(("stages.*.widht",))))
    assert caught.value.faults[0].dotted == "searcher.scales[1].keys"
    assert "stages.0.width" in str(caught.value)


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    options = load_catalogue().options("searchers", spec["searcher"])
    assert [scale.levels for scale in options.scales] == [scale.levels for scale in BIGNAS]
    assert grid_of(SPACE, scales=options.scales) == grid_of(SPACE)
