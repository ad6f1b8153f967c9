"""What a run would refuse only hours later, at a step or as its search begins, is refused before anything begins."""

from importlib.metadata import entry_points

import pytest
import tomli_w
from toys import DIGITS

from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare, refuse_ahead
from corenas.run.spec import load_spec

CATALOGUE = load_catalogue()
DRAWS_ANY_NUMBER = {"flops_uniform", "max", "uniform", "weighted"}
LARGEST_FIRST = {"attentive", "max", "sandwich"}
TRAINS = {
    "spos": {*CATALOGUE.names("mutators")},
    "cream": {*CATALOGUE.names("mutators")},
    "fairnas": {"fair"},
    "bignas": LARGEST_FIRST,
    "attentivenas": LARGEST_FIRST,
    "ofa": DRAWS_ANY_NUMBER,
}
"""What `corenas run` trained with each mutator at its defaults; it refused the others, at a step of some phase."""


def check(folder, **keys):
    """A spec with some keys changed, those that are None left out, as `corenas check --no-data` looks at it."""
    table = {key: item for key, item in {**DIGITS, **keys}.items() if item is not None}
    (folder / "spec.toml").write_text(tomli_w.dumps(table))
    refuse_ahead(prepare(load_spec(folder / "spec.toml", CATALOGUE)[0], data=False, weights=False), CATALOGUE)


def refusal(folder, **keys):
    with pytest.raises(UserError) as refused:
        check(folder, **keys)
    (fault,) = refused.value.faults
    return str(fault)


@pytest.mark.parametrize("algorithm", TRAINS)
def test_a_mutator_whose_archs_an_algorithm_refuses_is_refused_without_data(tmp_path, algorithm):
    options = {"type": "cream", "warmup": 1} if algorithm == "cream" else algorithm
    own = {"searcher": None, "search": None, "evaluators": None} if algorithm == "cream" else {}
    for mutator in CATALOGUE.names("mutators"):
        keys = {"algorithm": options, "mutator": {"type": mutator}, **own}
        if mutator in TRAINS[algorithm]:
            check(tmp_path, **keys)
        else:
            assert refusal(tmp_path, **keys).startswith("mutator")


def test_a_mutator_is_tried_in_every_phase(tmp_path):
    phases = [{"open": {"*kernel": "all"}, "paths": 2}, {"open": {"*": "all"}, "paths": 1}]
    ofa = {"type": "ofa", "phases": phases}
    assert "1 paths cannot use all 2 choices" in refusal(tmp_path, algorithm=ofa, mutator="fair")
    phases[1]["paths"] = 2
    check(tmp_path, algorithm=ofa, mutator="fair")


@pytest.mark.parametrize(("keys", "text"), [
    ({"searcher": {"type": "nevergrad", "optimizer": "Gradient"}}, "nevergrad has no optimizer 'Gradient'"),
    ({"searcher": {"type": "random", "stratify": "weight"}}, "no cost 'weight'"),
    ({"algorithm": "zennas", "mutator": None}, "accuracy needs a trained supernet"),
    ({"evaluators": ["accuracy", {"type": "latency_table", "file": "none.json"}]}, "cannot read this latency table"),
    ({"evaluators": ["accuracy", {"type": "latency", "device": "cuda"}]}, "no cuda device here"),
])  # fmt: skip
def test_what_a_search_is_refused_for_is_told_before_the_training(tmp_path, keys, text):
    assert text in refusal(tmp_path, **keys)


def test_evaluators_that_read_data_as_they_start_wait_for_the_run(tmp_path):
    check(tmp_path, evaluators=["naswot", "stand_alone"])


@pytest.mark.parametrize(("train", "algorithm", "fine"), [
    ({"batch_size": 4}, {}, True), ({"batch_size": 3}, {}, False), ({"batch_size": 8, "accumulate": 2}, {}, True),
    ({"batch_size": 7, "accumulate": 2}, {}, False), ({"batch_size": 7}, {"measured_on": "train"}, False),
    ({"batch_size": 7}, {"measured_on": "train", "pick": "best"}, True),
])  # fmt: skip
def test_cream_wants_its_images_in_each_part_of_a_batch(tmp_path, train, algorithm, fine):
    keys = {
        "algorithm": {"type": "cream", "warmup": 1, **algorithm}, "train": {"epochs": 2, **train},
        "searcher": None, "search": None, "evaluators": None,
    }  # fmt: skip
    if fine:
        check(tmp_path, **keys)
    else:
        assert "cream takes" in refusal(tmp_path, **keys)


def test_a_default_that_is_not_installed_is_told_once_with_what_has_it(tmp_path):
    points = [point for point in entry_points(group="corenas") if point.name != "distiller-knowledge"]
    table = {**DIGITS, "algorithm": "bignas", "mutator": "sandwich"}
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(UserError) as refused:
        load_spec(tmp_path / "spec.toml", load_catalogue(points))
    (fault,) = refused.value.faults
    assert fault.key == ("distiller",)
    assert fault.message == "no distiller 'soft_cross_entropy', this algorithm's default"
    assert fault.hint == "it comes with corenas-distiller-knowledge: pip install corenas-distiller-knowledge"
