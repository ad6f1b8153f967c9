"""The examples in docstrings of what the first page of `corenas` offers are run."""

import doctest
import importlib
import sys

import pytest

import corenas

MODULES = sorted({f"corenas.{module}" for module in corenas.NAMES.values()})
VERBS = sorted(name for name in corenas.NAMES if name.islower())


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_an_example(name):
    assert ">>> " in getattr(corenas, name).__doc__


def test_the_first_page_names_what_readme_imports():
    assert len(corenas.NAMES) >= 15
    assert {*corenas.NAMES} <= {*dir(corenas)}
    assert all(getattr(corenas, name).__module__ in sys.modules for name in corenas.NAMES)
