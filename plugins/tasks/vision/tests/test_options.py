"""What a table of options may say."""

import math
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torchvision.datasets

from corenas.contracts import Task
from corenas.errors import UserError
from corenas.options import explanations, structure, to_table
from corenas.plugins import load_catalogue
from corenas.testing.components import component_checks, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.tasks import task_checks
from corenas_task_vision import Classification, Data, MultiLabel, Regression, corenas_tasks
from corenas_task_vision.known import TORCHVISION


def wrong(table):
    with pytest.raises(UserError) as caught:
        structure(table, Classification)
    return {fault.dotted: str(fault) for fault in caught.value.faults}


@pytest.mark.parametrize("check", task_checks)
@pytest.mark.parametrize("options", [
    Classification("digits", augment=({"type": "RandomAffine", "degrees": 1},)),
    Classification("mnist5k", size=16, dropout=0.1, label_smoothing=0.1, augment=("RandomHorizontalFlip",)),
], ids=["digits", "mnist5k"])  # fmt: skip
def test_conforms(options, check):
    check(options)


@pytest.mark.parametrize("check", component_checks)
def test_options_of_a_folder_conform(check):
    check(Data("folder", root="photos"))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_task_vision")


def test_the_entry_module_imports_nothing_heavy():
    script = (
        "import sys, corenas_task_vision; sys.exit(bool({'torchvision', 'sklearn', 'mlxtend', 'PIL'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_options_are_a_task_under_its_name():
    assert corenas_tasks() == {"classification": Classification, "multilabel": MultiLabel, "regression": Regression}
    assert isinstance(Classification("digits"), Task)


@pytest.mark.parametrize("cls", [Classification, MultiLabel, Regression, Data])
def test_every_option_is_explained(cls):
    assert explanations(cls).keys() == {field.name for field in attrs.fields(cls)}


def test_the_readme_shows_specs_that_are_right():
    photos, cifar = (
        load_catalogue().options("tasks", spec["task"])
        for spec in spec_fragments(Path(__file__).parents[1] / "README.md")
    )
    assert (photos.source, photos.test, photos.dropout) == (Data("folder", root="photos"), 500, 0.2)
    assert (cifar.source.name, cifar.valid) == ("CIFAR10", 5000)
    for task, shape in ((attrs.evolve(photos, classes=7), (1, 3, 160, 160)), (cifar, (1, 3, 32, 32))):
        assert task.start(np.random.default_rng(0), data=False).example.shape == shape  # its transforms exist


@pytest.mark.parametrize("cls", [Classification, MultiLabel, Regression, Data])
def test_the_readme_names_every_option(cls):
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    assert not [field.name for field in attrs.fields(cls) if f"`{field.name}`" not in text]


def test_a_name_and_a_table_mean_the_same():
    short, long = (structure({"data": data}, Classification) for data in ("digits", {"type": "digits"}))
    assert short.source == long.source == Data("digits")


def test_options_survive_being_written_and_read_again():
    table = {"data": {"type": "torchvision", "name": "CIFAR10", "root": "r"}, "valid": 500, "test": 0.5, "mean": [0.5],
             "augment": ["RandomInvert", {"type": "RandomAffine", "degrees": 10}]}  # fmt: skip
    task = structure(table, Classification)
    assert structure(to_table(task), Classification) == task


@pytest.mark.parametrize(("key", "value", "text"), [
    ("data", "mnist", "expected 'mnist5k' or 'digits' or a table, found 'mnist'"),
    ("valid", 0, "expected a number of images, or a share between 0 and 1, found 0"),
    ("valid", 1.5, "expected a number of images, or a share"),
    ("test", -3, "expected a number of images, or a share"),
    ("test", "10%", "or a share between 0 and 1, found '10%'"),
    ("size", 0, "expected a whole number of at least 1 or a list, found 0"),
    ("crop", 1.5, "must be <= 1"),
    ("channels", 0, "must be >= 1"),
    ("classes", 1, "must be >= 2"),
    ("mean", [0.5, 0.5], "expected one number, found 2"),
    ("std", [0.0], "expected finite numbers above 0"),
    ("std", [math.inf], "expected finite numbers above 0"),
    ("mean", [math.inf], "expected finite numbers"),
    ("mean[0]", [math.nan], "expected a number, found nan"),
    ("mean[0]", [True], "expected a number, found true"),
    ("valid", 1.0, "expected a number of images, or a share"),
    ("valid", math.nan, "found nan"),
    ("test", True, "found true"),
    ("size", True, "expected a whole number of at least 1 or a list, found true"),
    ("size", 32.0, "expected a whole number of at least 1 or a list, found 32.0"),
    ("channels", True, "expected a whole number, found true"),
    ("dropout", math.nan, "expected a number, found nan"),
    ("dropout", "0.1", "expected a number, found '0.1'"),
    ("label_smoothing", False, "expected a number, found false"),
    ("augment[0]", [3], "found 3"),
    ("labels", 1, "unknown key"),
    ("label_smoothing", 1.2, "must be <= 1"),
    ("dropout", 1.0, "must be < 1"),
    ("augment", "RandomAffine", "expected a list"),
])  # fmt: skip
def test_a_wrong_value_is_told_with_its_key(key, value, text):
    assert text in wrong({"data": "digits", key.removesuffix("[0]"): value})[key]


def test_all_wrong_values_are_told_at_once():
    assert {*wrong({"data": "digits", "mean": [1, 2], "std": [0.0]})} == {"mean", "std"}
    assert {*wrong({"data": "nothing", "valid": 0, "size": -1, "x": 1})} == {"data", "valid", "size", "x"}


@pytest.mark.parametrize("amount", [0.001, 0.999, 1, 700])
def test_amounts_are_shares_below_1_and_whole_numbers_from_1_on(amount):
    task = structure({"data": "digits", "valid": amount}, Classification)
    assert (task.valid, type(task.valid)) == (amount, type(amount))


def test_a_data_table_that_lacks_a_key_or_has_a_useless_one_is_told():
    assert "required for 'folder'" in wrong({"data": {"type": "folder"}})["data.root"]
    assert {*wrong({"data": {"type": "torchvision"}})} == {"data.root", "data.name"}
    assert "no such option" in wrong({"data": {"type": "digits", "root": "r"}})["data.root"]
    assert "no such option" in wrong({"data": {"type": "folder", "root": "r", "download": True}})["data.download"]


def test_an_unknown_data_set_is_answered_with_close_names():
    text = wrong({"data": {"type": "torchvision", "name": "CIFAR", "root": "r"}})["data.name"]
    assert "did you mean 'CIFAR10'" in text


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_has_every_data_set_that_is_offered(name):
    assert name in torchvision.datasets.__all__
