import json
from pathlib import Path

import numpy as np
import pytest
import tomli

from corenas.contracts import Problem, Searcher
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import archs, drive, large_space, learning_searcher_checks, searcher_checks
from corenas_searcher_zennas import ZenNAS, corenas_searchers
from corenas_searcher_zennas.structure import mutate, scaled, super_blocks

SPACES = Path(__file__).parents[4] / "spec" / "space"
CIFAR, IDW, TINY = (
    SearchSpace.from_table(tomli.loads((SPACES / f"zennas-{name}.toml").read_text()))
    for name in ("cifar", "idw", "tiny")
)


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    check(ZenNAS())


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_a_small_population_conforms_and_learns(check):
    check(ZenNAS(population=16, first=4))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_zennas")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"zennas": ZenNAS}
    assert isinstance(ZenNAS(), Searcher)


@pytest.mark.parametrize("key", ["population", "replaced", "split", "max_layers"])
def test_wrong_options_are_named(key):
    with pytest.raises(UserError) as caught:
        structure({key: 0}, ZenNAS)
    assert [fault.dotted for fault in caught.value.faults] == [key]


# -- mutation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "candidates"), [
    (40, [16, 24, 32, 40, 48, 64, 80, 96]),  # 100 is 12.5 times 8: to the even 96; 26.7, 50 and 60 beside it
    (8, [8, 16]),
    (1000, [400, 504, 664, 800, 1000, 1248, 1496, 2000, 2048]),
])  # fmt: skip
def test_widths_become_the_multiples_of_the_reference_code(width, candidates):
    """`get_select_student_channels_list` of SearchSpace/search_space_XXBL.py: rounded to 8, from 8 to 2048."""
    factors = (2.5, 2, 1.5, 1.25, 1, 1 / 1.25, 1 / 1.5, 1 / 2, 1 / 2.5)
    reference = {max(8, round(min(2048, max(8, width * factor)) / 8) * 8) for factor in factors}
    found = scaled(range(8, 2049, 8), width)
    ties = {width * factor for factor in factors if width * factor % 8 == 4}
    assert {*found} ^ reference <= {tie + side for tie in ties for side in (-4, 4)}  # halves: here to the smaller
    if not ties:
        assert {*found} == reference
    assert {*found} <= {*candidates} | {tie - 4 for tie in ties}


def drawn(space, parent, n=400, replaced=1, split=6, seed=0):
    """Mutants of an arch."""
    rng = np.random.default_rng(seed)
    made = [mutate(super_blocks(space.variables), parent, replaced, split, rng) for _ in range(n)]
    return space.decode(space.admit(space.encode([choices for choices in made if choices is not None])))


def test_super_blocks_are_the_tables_of_a_space():
    blocks = super_blocks(TINY.variables)
    assert [[*block.variables] for block in blocks] == [
        ["width"],
        *[["depth", "op", "kernel", "width", "bottleneck"]] * 6,
    ]
    assert [block.spare for block in blocks] == [False, False, True, False, True, False, True]
    assert [block.layers(TINY.default()) for block in blocks] == [1, 1, 0, 1, 0, 1, 0]


def test_one_super_block_that_is_there_is_replaced_and_every_one_comes_up():
    parent = CIFAR.default()
    changed = []
    for arch in drawn(CIFAR, parent):
        tables = {key.rpartition(".")[0] for key in arch if arch[key] != parent[key]}
        assert len(tables) <= 1
        changed += tables
    assert {*changed} == {"stem", "head", "stages.0", "stages.4", "stages.8", "stages.12"}


def test_a_mutant_has_what_the_reference_code_offers_each_as_often():
    parent = CIFAR.arch({"stages.4.depth": 3})
    mutants = [a for a in drawn(CIFAR, parent, 2500) if a["stages.0.depth"] == 1 and a["stages.12.depth"] == 1]
    own = [a for a in mutants if any(a[k] != parent[k] for k in a if k.startswith("stages.4."))]
    assert {a["stages.4.depth"] for a in own} == {1, 2, 3, 4, 5}
    assert {a["stages.4.op"] for a in own} == {"BL", "XX"}
    assert {a["stages.4.kernel"] for a in own} == {3, 5, 7}
    assert {a["stages.4.width"] for a in own} == {16, 24, 32, 40, 48, 64, 80}
    assert {a["stages.4.bottleneck"] for a in own} == {8, 16, 24, 32, 40}
    shares = np.bincount([a["stages.4.depth"] for a in own])[1:] / len(own)
    assert np.allclose(shares, 0.2, atol=0.06)


def test_two_super_blocks_are_replaced_and_one_drawn_twice_once():
    parent = IDW.default()
    tables = [
        {key.rpartition(".")[0] for key in arch if arch[key] != parent[key]} for arch in drawn(IDW, parent, replaced=2)
    ]
    assert {len(changed) for changed in tables} == {0, 1, 2} or {len(changed) for changed in tables} == {1, 2}
    assert max(map(len, tables)) == 2


# -- splitting --------------------------------------------------------------------------------------------------------


def stages(arch, space):
    """(depth, width) of each super-block that is there."""
    count = len({key.split(".")[1] for key in space.keys if key.startswith("stages.")})
    found = [(arch[f"stages.{i}.depth"], arch[f"stages.{i}.width"]) for i in range(count)]
    return [pair for pair in found if pair[0]]


def test_six_sub_layers_become_three_and_three_and_seven_three_and_four():
    parent = CIFAR.arch({"stages.4.depth": 5, "stages.4.width": 1000, "stages.4.kernel": 7})
    split = [arch for arch in drawn(CIFAR, parent, 800) if arch["stages.5.depth"]]
    assert {(a["stages.4.depth"], a["stages.5.depth"]) for a in split} == {(3, 3), (3, 4)}
    for arch in split:
        for name in ("op", "kernel", "width", "bottleneck"):
            assert arch[f"stages.4.{name}"] == arch[f"stages.5.{name}"]
        assert arch["stages.6.depth"] == 0


def test_what_comes_behind_a_split_moves_on():
    parent = CIFAR.arch({
        "stages.4": {"depth": 5, "width": 1000},
        "stages.5": {"depth": 2, "width": 104, "bottleneck": 24, "op": "BL", "kernel": 5},
    })  # fmt: skip
    split = [a for a in drawn(CIFAR, parent, 800) if a["stages.6.depth"] and a["stages.4.depth"] == 3]
    assert split
    for arch in split:
        assert stages(arch, CIFAR)[3] == (2, 104)
        kept = [arch[f"stages.6.{name}"] for name in ("bottleneck", "op", "kernel")]
        assert kept == [24, "BL", 5]
        assert arch["stages.7.depth"] == 0


def test_without_room_a_super_block_is_not_deeper_than_the_space_has_it():
    full = {f"stages.{i}.depth": 5 for i in range(16)}
    parent = CIFAR.arch(full)
    for arch in drawn(CIFAR, parent, 300):
        assert sum(depth for depth, _ in stages(arch, CIFAR)) <= 80
        assert len(stages(arch, CIFAR)) == 16
    plain = SearchSpace.from_table({"stages": [{"depth": {"type": "int", "low": 1, "high": 9}, "width": [8, 16]}]})
    deep = [arch["stages.0.depth"] for arch in drawn(plain, plain.arch({"stages.0.depth": 8}))]
    assert {*deep} == {6, 7, 8, 9}


def test_a_super_block_that_is_there_never_goes():
    arch = CIFAR.arch({"stages.1.depth": 1})
    rng = np.random.default_rng(0)
    for _ in range(300):
        choices = mutate(super_blocks(CIFAR.variables), arch, 2, 6, rng)
        arch = arch if choices is None else CIFAR.arch(choices)
        assert arch["stages.1.depth"] > 0
        assert all(arch[f"stages.{i}.depth"] > 0 for i in (0, 4, 8, 12))


# -- the search -------------------------------------------------------------------------------------------------------


def problem(space, budget=1000):
    return Problem(space, Objectives((Objective("score"),)), budget)


def score(arch):
    """Deep and wide is good."""
    layers = sum(arch[key] for key in arch if key.endswith("depth"))
    return Trial(arch, {"score": layers + sum(arch[key] for key in arch if key.endswith("width")) / 1000})


def test_the_first_mutants_are_those_of_the_default_arch():
    search = ZenNAS().start(problem(TINY), np.random.default_rng(0))
    parent, told = TINY.default(), []
    while len(search.population) <= 10:
        (arch,) = search.ask(1)
        tables = {key.rpartition(".")[0] for key in arch if arch[key] != parent[key]}
        assert len(tables) <= 1  # what is replaced may come out as it was
        told.append(score(arch))
        search.tell(told[-1:])
    later = search.ask(50)
    far = [len({key.rpartition(".")[0] for key in arch if arch[key] != parent[key]}) for arch in later]
    assert max(far) > 1


def test_the_worst_is_dropped_as_soon_as_there_is_one_too_many():
    search = ZenNAS(population=20).start(problem(TINY), np.random.default_rng(0))
    history = drive(search, problem(TINY), score, rounds=200, batch=1)
    ranked = sorted((trial.metrics["score"] for trial in history), reverse=True)
    assert len(search.population) == 20
    assert [trial.metrics["score"] for trial in search.population] == ranked[:20]
    assert ranked[0] > score(TINY.default()).metrics["score"] + 5


def test_no_arch_is_deeper_than_allowed():
    search = ZenNAS(population=30, max_layers=9).start(problem(TINY), np.random.default_rng(0))
    history = drive(search, problem(TINY), score, rounds=300, batch=1)
    depths = [sum(depth for depth, _ in stages(trial.arch, TINY)) for trial in history]
    assert len(history) == 300
    assert max(depths) == 9


def test_fewer_layers_than_any_arch_has_are_refused():
    with pytest.raises(UserError, match="has 3 sub-layers, more than 2"):
        ZenNAS(max_layers=2).start(problem(TINY), np.random.default_rng(0))


class Narrow:
    """The part of a space in which nothing is wider than 64."""

    def __init__(self, space):
        self.space, self.variables = space, space.variables
        self.encode, self.decode = space.encode, space.decode

    def admit(self, codes):
        codes = self.space.canonical(codes)
        inside = [all(arch[key] <= 64 for key in arch if key.endswith("width")) for arch in self.decode(codes)]
        return codes[np.array(inside, bool)]

    def sample(self, rng):
        return self.space.arch({"stem.width": 64})


def test_mutants_obey_the_constraints_and_a_first_arch_outside_gives_way():
    search = ZenNAS(population=30).start(problem(Narrow(TINY)), np.random.default_rng(0))
    history = drive(search, problem(TINY), score, rounds=100, batch=1)
    assert len(history) == 100
    assert all(trial.arch[key] <= 64 for trial in history for key in trial.arch if key.endswith("width"))
    assert search.initial == TINY.default()
    wide = SearchSpace.from_table({"stem": {"width": [8, 64, 128]}, "stages": [{"width": [8, 16], "kernel": [3, 5]}]})
    assert ZenNAS().start(problem(Narrow(wide)), np.random.default_rng(0)).initial == wide.arch({"stem.width": 64})


def test_a_run_stopped_between_ask_and_tell_goes_on_the_same_way():
    first, second = (ZenNAS(population=12).start(problem(CIFAR), np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem(CIFAR), score, rounds=10, batch=7)
    asked = first.ask(7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([*map(score, asked)])
    assert archs(drive(first, problem(CIFAR), score, rounds=5)) == archs(drive(second, problem(CIFAR), score, rounds=5))


def test_spaces_without_super_blocks_are_searched_too():
    space = large_space()
    search = ZenNAS(population=8, first=2).start(problem(space), np.random.default_rng(0))
    told = drive(search, problem(space), lambda arch: Trial(arch, {"score": arch["ratio"]}), rounds=20)
    assert max(trial.metrics["score"] for trial in told) == 1.0


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == ZenNAS(population=512, max_layers=16)
