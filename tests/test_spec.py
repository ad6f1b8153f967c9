"""Specs: where each key stands, all mistakes at once with file and line, and what a good one becomes."""

import copy
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tomli
import tomli_w
from attrs import field, frozen
from attrs.validators import ge, gt

from corenas.errors import Fault, UserError
from corenas.hookspecs import hookimpl
from corenas.plugins import load_catalogue
from corenas.run.spec import SPECS, Export, Goal, Range, load_spec, space_file
from corenas.run.toml import key_lines
from corenas.settings import Racing
from corenas.space import SearchSpace
from corenas.value import Value
from corenas.variables import Categorical

# -- a catalogue of toys ----------------------------------------------------------------------------------------------


@frozen
class ToyTask:
    """A task.

    classes: how many
    data: where from
    """

    classes: int = field(default=3, validator=ge(2))
    data: str | None = None

    def start(self, *context): ...


@frozen
class Block:
    """A block."""

    kernel: Value


@frozen
class Layout:
    """A space.

    width: of all layers
    """

    width: Value
    depth: Value
    blocks: tuple[Block, ...]
    resolution: Value | None = None


@frozen
class Net:
    """A backbone.

    mult: of the width
    """

    mult: float = field(default=1.0, validator=gt(0))
    layout: ClassVar = Layout

    def build(self, space): ...


@frozen
class OneShot:
    """An algorithm."""

    stages: ClassVar = ("train", "search")
    needs: ClassVar = ("mutator", "searcher")

    def start(self, *context): ...


@frozen
class Scores:
    """An algorithm without training."""

    stages: ClassVar = ("search",)
    needs: ClassVar = ("searcher",)

    def start(self, *context): ...


@frozen
class Options:
    """Something with one option.

    n: a number
    """

    n: int = field(default=2, validator=ge(1))

    def start(self, *context): ...

    def provides(self, task): ...

    def write(self, *network): ...

    cheap: ClassVar = True


@frozen
class Uniform(Options):
    """A mutator."""


@frozen
class Random(Options):
    """A searcher."""


@frozen
class CellLayout:
    """A space of cells.

    stem: width
    """

    stem: Value
    cells: tuple[dict[str, Any], ...]


@frozen
class Cells(Net):
    """A backbone of cells."""

    layout: ClassVar = CellLayout


@frozen
class Giving:
    """A backbone that gives its space.

    mult: of the width
    """

    mult: float = 1.0

    def build(self, space): ...

    def space(self):
        if self.mult > 2:
            raise UserError("this network has no space", key=("backbone", "mult"))
        return SearchSpace([Categorical("a.width", (4, 8)), Categorical("b.0.width", (4, 8, round(16 * self.mult)))])


class Untrained(Options):
    """An evaluator of fresh networks."""

    alone: ClassVar = False


@frozen
class Trains(Options):
    """An evaluator that trains."""

    alone: ClassVar = True


@frozen
class Races(Options):
    """An evaluator that lets archs race."""

    races: ClassVar = True


class Plugin:
    corenas_tasks = staticmethod(hookimpl(specname="corenas_tasks")(lambda: {"toy": ToyTask}))
    corenas_backbones = staticmethod(
        hookimpl(specname="corenas_backbones")(lambda: {"net": Net, "giving": Giving, "cells": Cells})
    )
    corenas_algorithms = staticmethod(
        hookimpl(specname="corenas_algorithms")(lambda: {"oneshot": OneShot, "scores": Scores})
    )
    corenas_mutators = staticmethod(hookimpl(specname="corenas_mutators")(lambda: {"uniform": Uniform}))
    corenas_searchers = staticmethod(hookimpl(specname="corenas_searchers")(lambda: {"random": Random}))
    corenas_evaluators = staticmethod(
        hookimpl(specname="corenas_evaluators")(
            lambda: {"accuracy": Options, "untrained": Untrained, "trains": Trains, "races": Races}
        )
    )
    corenas_exporters = staticmethod(
        hookimpl(specname="corenas_exporters")(lambda: dict.fromkeys(Export().formats, Options))
    )


CATALOGUE = load_catalogue(found=[], extra=[("toy", Plugin)])

SPACE = """\
width = [8, 16, 24]
depth = [1, 2]
resolution = { type = "int", low = 8, high = 32, step = 8 }
block = { kernel = [3, 5] }
"""
SPEC = """\
# a spec
seed = 3
task = { type = "toy", classes = 10 }
backbone = "net"
space = "space.toml"
algorithm = "oneshot"
mutator = "uniform"
evaluators = ["accuracy"]

[searcher]
type = "random"
n = 5

[train]
epochs = 2
schedule = { type = "cosine", warmup = 1 }

[search]
objectives = ["top1", { metric = "flops", weight = 1e-9 }]
constraints = { flops = "60%", params = [1e3, "2M"], top1 = { min = 50 } }
"""


@pytest.fixture
def write(tmp_path):
    def write(spec=SPEC, space=SPACE, **more):
        (tmp_path / "space.toml").write_text(space)
        (tmp_path / "spec.toml").write_text(spec)
        return tmp_path / "spec.toml"

    return write


def faults(path, *overrides):
    """The mistakes of a spec: (file name, line, key, message)."""
    with pytest.raises(UserError) as caught:
        load_spec(path, CATALOGUE, overrides)
    return [((f.file or "").rsplit("/")[-1], f.line, f.dotted, f.message) for f in caught.value.faults]


def places(path, *overrides):
    return sorted(fault[:3] for fault in faults(path, *overrides))


# -- where keys stand -------------------------------------------------------------------------------------------------

NASTY = ['"[x] = {1}, # no"', "'it = [' ", '"\\" ["', '"""\n a = 1 # [\n\\""" ]"""', "'''\n'' ]\n\n'''", '""', '""""""',
         "1.5e3", "1979-05-27 07:32:00.5", "-inf", "true", '"""a"" """', '""""quoted""""', "0x1F"]  # fmt: skip


class Text:
    """A TOML text in the making, in which each key that holds a number holds the number of its line."""

    def __init__(self, seed):
        self.rng, self.text = random.Random(seed), ""

    def key(self, i):
        return self.rng.choice([f"k{i}", f'"k.{i} = [#"', f"'q{i}]'", f"{i}", f"k-{i}"])

    def line(self):
        return self.text.count("\n") + 1

    def space(self, newline=False):
        self.text += self.rng.choice(["", "", " ", "\t", *(["\n", " # ], } = [\n", "\n\n"] if newline else [])])

    def value(self, depth=0, kind=None):
        kind = kind or self.rng.choice(["line", "line", "nasty", *(["array", "table"] if depth < 3 else [])])
        if kind == "line":
            self.text += str(self.line())
        elif kind == "nasty":
            self.text += self.rng.choice(NASTY).strip()
        elif kind == "array":
            self.text += "["
            for i in range(n := self.rng.randrange(4)):
                self.space(True)
                self.value(depth + 1)
                self.space(True)
                self.text += "," if i < n - 1 or self.rng.random() < 0.3 else ""
            self.space(True)
            self.text += "]"
        else:
            self.text += "{"
            for i in range(n := self.rng.randrange(4)):
                self.space(True)
                self.pair(i, depth + 1)
                self.space(True)
                self.text += "," if i < n - 1 or self.rng.random() < 0.3 else ""
            self.space(True)
            self.text += "}"

    def pair(self, i, depth=0):
        self.text += self.key(i)
        for _ in range(self.rng.choice([0, 0, 1, 2])):
            self.space()
            self.text += "."
            self.space()
            self.text += self.key(0)
        self.space()
        self.text += "="
        self.space()
        self.value(depth)

    def body(self):
        for i in range(self.rng.randrange(4)):
            self.text += self.rng.choice(["", "\n", "# [comment] = {\n", "  "])
            self.pair(i)
            self.space()
            self.text += self.rng.choice(["\n", "# '''\n"])

    def whole(self):
        self.body()
        for i in range(self.rng.randrange(4)):
            name = self.rng.choice([f"t{i}", f'"t.{i}]"', f"t{i}.'a b'.c", f" t{i} . b "])
            if self.rng.random() < 0.5:
                self.text += f"[{name}] # [[\n"
                self.body()
                if self.rng.random() < 0.3:
                    self.text += f"[{name}.sub]\n"
                    self.body()
            else:
                for _ in range(self.rng.randrange(1, 4)):
                    self.text += f"[[{name}]]\n"
                    self.body()
                    if self.rng.random() < 0.4:
                        self.text += f"[[{name}.inner]]\n"
                        self.body()
                        self.text += f"[{name}.inner.x]\n"
                        self.body()
        return self.text


def numbers(item, path=()):
    """All whole numbers in a table that `Text` wrote as the number of their line, with their paths."""
    if isinstance(item, dict):
        for key, inner in item.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(item, list):
        for i, inner in enumerate(item):
            yield from numbers(inner, (*path, i))
    elif type(item) is int and item != 0x1F:
        yield path, item


@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_every_key_of_any_text_is_found_on_its_line(start):
    found = 0
    for seed in range(start, start + 100):
        text = Text(seed).whole()
        table = tomli.loads(text)
        lines = key_lines(text)
        for path, line in numbers(table):
            assert lines.get(path) == line, (seed, path, text)
            found += 1
    assert found > 300


def test_a_table_is_found_where_its_header_stands():
    lines = key_lines('a.b = 1\n[t]\nx = [\n  1,\n  [2],\n  { y = 3 }]\n[[u]]\n[[u]]\nv."w.x".y = 2\n[t.s]\n')
    assert lines == {(): 1, ("a",): 1, ("a", "b"): 1, ("t",): 2, ("t", "x"): 3, ("t", "x", 0): 4, ("t", "x", 1): 5,
                     ("t", "x", 1, 0): 5, ("t", "x", 2): 6, ("t", "x", 2, "y"): 6, ("u",): 7, ("u", 0): 7,
                     ("u", 1): 8, ("u", 1, "v"): 9, ("u", 1, "v", "w.x"): 9, ("u", 1, "v", "w.x", "y"): 9,
                     ("t", "s"): 10}  # fmt: skip


# -- a good spec ------------------------------------------------------------------------------------------------------


def test_a_good_spec_becomes_objects(write):
    spec, _ = load_spec(write(), CATALOGUE)
    assert (spec.name, spec.seed, spec.task, spec.backbone) == ("spec", 3, ToyTask(10), Net())
    assert (spec.mutator, spec.searcher, spec.evaluators) == (Uniform(), Random(5), (Options(),))
    assert spec.search.goals == [Goal("top1"), Goal("flops", weight=1e-9)]
    assert spec.search.constraints == {"flops": "60%", "params": (1e3, "2M"), "top1": Range(min=50)}
    assert spec.space.keys == ("width", "depth", "resolution", "blocks.0.kernel", "blocks.1.kernel")


def test_a_resolved_spec_reads_back_as_the_same(write, tmp_path):
    spec, _ = load_spec(write(), CATALOGUE)
    table = spec.to_table(CATALOGUE)
    (tmp_path / "resolved.toml").write_text(tomli_w.dumps(table))
    again, _ = load_spec(tmp_path / "resolved.toml", CATALOGUE)
    assert again.space.variables == spec.space.variables
    assert again.to_table(CATALOGUE) == table
    for name in ("task", "backbone", "algorithm", "mutator", "searcher", "evaluators", "name", "seed", "device",
                 "train", "search", "calibration", "export"):  # fmt: skip
        assert getattr(again, name) == getattr(spec, name), name


def test_what_an_algorithm_needs_is_required(write):
    without = SPEC.replace('mutator = "uniform"\n', "").replace('[searcher]\ntype = "random"\nn = 5\n', "")
    assert faults(write(without)) == [
        ("spec.toml", 1, "mutator", "required key is missing"),
        ("spec.toml", 1, "searcher", "required key is missing"),
    ]
    assert places(write(without.replace("oneshot", "scores"))) == [("spec.toml", 1, "searcher")]
    load_spec(write(SPEC.replace('mutator = "uniform"\n', "").replace("oneshot", "scores")), CATALOGUE)


def test_fix_and_narrow_leave_fewer_choices(write):
    part = 'space = { file = "space.toml", fix = { depth = 1 }, narrow = { width = [8, 16] } }'
    spec, _ = load_spec(write(SPEC.replace('space = "space.toml"', part)), CATALOGUE)
    assert [*spec.space["depth"].choices] == [1]
    assert [*spec.space["width"].choices] == [8, 16]
    dotted = SPEC.replace('space = "space.toml"\n', "") + '[space]\nfile = "space.toml"\nfix.blocks.0.kernel = 3\n'
    spec, _ = load_spec(write(dotted), CATALOGUE)
    assert [*spec.space["blocks.0.kernel"].choices] == [3]


def test_the_file_of_an_arch_fixes_all_variables(write, tmp_path, monkeypatch):
    text = SPEC.replace('space = "space.toml"', 'space = { file = "space.toml", fix = "arch.toml" }')
    path = write(text)
    whole = load_spec(write(SPEC), CATALOGUE)[0].space
    (tmp_path / "arch.toml").write_text('"blocks.0.kernel" = 3\ndepth = 1\n')
    spec, _ = load_spec(write(text), CATALOGUE)
    assert spec.space.size == 1
    assert spec.space.default() == whole.arch({"blocks.0.kernel": 3, "depth": 1})  # what is left out is as in default
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "arch.toml").rename(elsewhere / "arch.toml")
    monkeypatch.chdir(elsewhere)  # as the folders of runs are looked for
    assert load_spec(path, CATALOGUE)[0].space.default() == spec.space.default()
    over, _ = load_spec(write(SPEC), CATALOGUE, ["space.fix=arch.toml"])
    assert over.space.default() == spec.space.default()


def test_mistakes_in_the_file_of_an_arch_are_told_with_its_lines(write, tmp_path):
    text = SPEC.replace('space = "space.toml"', 'space = { file = "space.toml", fix = "arch.toml" }')
    assert places(write(text)) == [("spec.toml", 5, "space.fix")]  # there is none
    (tmp_path / "arch.toml").write_text('depth = 1\n"blocks.0.kernel" = 4\nwidht = 3\n')
    assert places(write(text)) == [("arch.toml", 2, "blocks.0.kernel"), ("arch.toml", 3, "widht")]
    (tmp_path / "arch.toml").write_text("depth = = 1\n")
    assert [place[:2] for place in places(write(text))] == [("arch.toml", 1)]
    long = text.replace("arch.toml", "a" * 300)
    assert places(write(long)) == [("spec.toml", 5, "space.fix")]


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_where_they_stand(write):
    spec = """\
seed = "3"
sed = 3
task = { type = "toy", classes = 1, clases = 3 }
backbone = "ned"
space = "space.toml"
algorithm = { type = "oneshot" }
mutator = { type = "uniform", n = 2.5 }
searcher = "random"
evaluators = [
  "accuracy",
  { type = "accuracy", n = 0 },
  "acuracy",
]

[train]
epochs = -1
optimizer.type = "SDG"
optimizer.lr = 0.1
schedule.type = "cosine"
schedule.warmup = true

[search]
constraints.flops = "200Q"
constraints.params = [1]
"""
    assert places(write(spec)) == [
        ("spec.toml", 1, "seed"),
        ("spec.toml", 2, "sed"),
        ("spec.toml", 3, "task.clases"),
        ("spec.toml", 3, "task.classes"),
        ("spec.toml", 4, "backbone.type"),
        ("spec.toml", 7, "mutator.n"),
        ("spec.toml", 11, "evaluators[1].n"),
        ("spec.toml", 12, "evaluators[2].type"),
        ("spec.toml", 16, "train.epochs"),
        ("spec.toml", 17, "train.optimizer.type"),
        ("spec.toml", 20, "train.schedule.warmup"),
        ("spec.toml", 23, "search.constraints.flops"),
        ("spec.toml", 24, "search.constraints.params"),
    ]


def test_an_unknown_component_is_answered_with_close_names_and_what_is_installed(write):
    with pytest.raises(UserError) as caught:
        load_spec(write(SPEC.replace('"uniform"', '"unifrom"')), CATALOGUE)
    (fault,) = caught.value.faults
    assert fault.message == "no mutator 'unifrom'"
    assert fault.line == 7
    for text in ("did you mean 'uniform'?", "installed mutators: uniform"):
        assert text in fault.hint


def test_mistakes_of_a_space_stand_in_the_space_file(write):
    space = 'width = [8, "16"]\n\nresolution = 8\ndepth = [1, 2]\nblock = { kernel = { type = "imt" } }\n'
    assert places(write(space=space)) == [("space.toml", 1, "width"), ("space.toml", 5, "block.kernel.type")]
    assert places(write(space="depth = 1\nblock.kernel = 3\nwidht = 4")) == [
        ("space.toml", 1, "width"), ("space.toml", 3, "widht")]  # fmt: skip
    assert places(write(SPEC + "[space]\nwidth = []\n".replace("space", "spade"), "width = [8, 8]")) == [
        ("space.toml", 1, "width"), ("spec.toml", 21, "spade")]  # fmt: skip


def test_mistakes_of_a_space_in_the_spec_stand_in_the_spec(write):
    inline = (
        SPEC.replace('space = "space.toml"\n', "") + "\n[space]\nwidth = 8\nwidths = 3\n[space.block]\nkernel = 3\n"
    )
    assert places(write(inline)) == [("spec.toml", 21, "space")]
    assert places(write(inline.replace("width = 8", "width = 8\ndepth = 1"))) == [("spec.toml", 24, "space.widths")]


def test_what_a_backbone_does_not_take_is_located_in_the_space(write):
    space = 'width = [8]\ndepth = [2, 3]\n[block]\nkernel = [3, 5]\nkernal = 3\nexpand = "x"\n'
    assert places(write(space=space)) == [("space.toml", 5, "block.kernal"), ("space.toml", 6, "block.expand")]
    written = "width = [8]\ndepth = [1, 2]\n[[blocks]]\nkernel = 3\n[[blocks]]\nkernal = 3\n"
    assert places(write(space=written)) == [
        ("space.toml", 5, "blocks[1].kernel"),
        ("space.toml", 6, "blocks[1].kernal"),
    ]


def test_layout_mistakes_are_told_beside_others(write):
    assert places(write(SPEC.replace("seed = 3", "seed = -0.5"), SPACE + "more = 3\n")) == [
        ("space.toml", 5, "more"), ("spec.toml", 2, "seed")]  # fmt: skip


def test_mistakes_of_fix_and_narrow_stand_where_they_are_written(write):
    part = """[space]
file = "space.toml"
fix.depth = 7
fix.blocks.0.kernel = 4
[space.narrow]
width = 8
"blocks.*.kernel" = [3, 4]
depht = [1]
"""
    assert places(write(SPEC.replace('space = "space.toml"\n', "") + part)) == [
        ("spec.toml", 22, "space.fix.depth"),
        ("spec.toml", 23, "space.fix.blocks.0.kernel"),
        ("spec.toml", 25, "space.narrow.width"),
    ]
    part = part.replace("width = 8", "width = [8]")
    assert {*places(write(SPEC.replace('space = "space.toml"\n', "") + part.replace("fix.", "#")))} == {
        ("spec.toml", 26, "space.narrow.blocks.*.kernel"),
        ("spec.toml", 27, "space.narrow.depht"),
    }


@pytest.mark.parametrize("space", [
    "3", "[1]", '{ file = 3 }', '{ file = "space.toml", width = 3 }', '"gone.toml"', '""', '"a\\u0000b"',
    '{ file = "space.toml", fix = 3, narrow = [1] }',
])  # fmt: skip
def test_a_space_that_is_none_is_a_mistake_of_the_spec(write, space):
    for file, line, key, _ in faults(write(SPEC.replace('"space.toml"', space))):
        assert (file, line) == ("spec.toml", 5)
        assert key.startswith("space")


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_those_that_are_there(write, tmp_path):
    write()
    with pytest.raises(UserError, match=r"no such spec file") as caught:
        load_spec(tmp_path / "spek.toml", CATALOGUE)
    assert "did you mean 'spec.toml'" in caught.value.faults[0].hint
    assert faults(tmp_path / "none" / "x.toml")[0][3] == "no such spec file"


def test_files_that_cannot_be_read_are_mistakes(write, tmp_path, monkeypatch):
    assert "Is a directory" in faults(tmp_path)[0][3]
    path = write()
    told = "cannot read this spec file: line {} is not in UTF-8, in which TOML is written"
    for content, line in (
        (b'name = "\xff"', 1),
        ("a = 1\nb = 'é'\n".encode("latin-1"), 2),
        ("a = 1".encode("utf-16"), 1),
    ):
        path.write_bytes(content)
        assert faults(path)[0][3] == told.format(line)
    (tmp_path / "link.toml").symlink_to("gone.toml")
    text = "cannot read this spec file: it is a link to gone.toml, which is not there"
    assert faults(tmp_path / "link.toml")[0][3] == text
    (write().parent / "space.toml").write_bytes(b'name = "\xff"')
    assert faults(path)[0][:3] == ("spec.toml", 5, "space.file")
    assert "Not a directory" in faults(path / "x")[0][3]

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert faults(path)[0][3] == "cannot read this spec file: Permission denied"


def test_what_is_no_toml_is_told_with_its_line(write):
    assert faults(write("seed = 1\n\nx = [1,\n"))[0][:2] == ("spec.toml", 4)
    assert faults(write(space="a = 1\nb = = 2"))[0][:2] == ("space.toml", 2)
    assert places(write("x = " + "[" * 100_000))[0][0] == "spec.toml"
    for deep in (
        "[" + ".".join("a" * 400) + "]",
        "x = " + "[" * 60 + "1" + "]" * 60,
        "x = " + "{a = " * 60 + "1" + "}" * 60,
    ):
        [(file, _, key, message)] = faults(write(space=SPACE + deep))
        assert (file, key) == ("spec.toml", "space.file")
        assert message == "cannot read this space file: tables and lists stand in each other more than 50 deep"
    assert places(write("x = " + "9" * 5000))[0][0] == "spec.toml"


def test_a_byte_order_mark_does_not_matter(write):
    path = write()
    path.write_bytes(b"\xef\xbb\xbf" + SPEC.encode())
    assert load_spec(path, CATALOGUE)[0].seed == 3


def test_a_spec_may_be_called_as_people_call_files(write, tmp_path, monkeypatch):
    path = write().rename(tmp_path / "my spec (1).toml")
    assert load_spec(path, CATALOGUE)[0].name == "my-spec-1"


def test_the_home_folder_is_written_as_in_a_shell(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spec, _ = load_spec(write(), CATALOGUE, ["task.data=~/images"])
    assert spec.task.data == f"{tmp_path}/home/images"
    spec, _ = load_spec(write(), CATALOGUE, ['task={type="toy", data="~/pictures"}'])
    assert spec.task.data == f"{tmp_path}/home/pictures"
    path = write()
    (tmp_path / "space.toml").rename((tmp_path / "home").mkdir() or tmp_path / "home" / "space.toml")
    path.write_text(SPEC.replace('"space.toml"', '"~/space.toml"'))
    assert load_spec(path, CATALOGUE)[0].space.to_table() == SearchSpace.from_table(tomli.loads(SPACE)).to_table()


def test_a_device_is_said_as_short_as_a_component(write):
    device = load_spec(write(f'device = "cuda"\n{SPEC}'), CATALOGUE, ["device.threads=2"])[0].device
    assert (device.type, device.threads) == ("cuda", 2)
    assert places(write(f'device = "gpu"\n{SPEC}')) == [("spec.toml", 1, "device.type")]


def test_names_that_differ_by_case_or_by_letters_that_look_alike_are_told_apart(write):
    wrong = SPEC.replace('"random"', '"r\u0430ndom"')
    with pytest.raises(UserError, match=r"did you mean 'random'\? \('а' is CYRILLIC SMALL LETTER A \(U\+0430\)\) "):
        load_spec(write(wrong), CATALOGUE)
    with pytest.raises(UserError, match="did you mean 'AdamW'\\? optimizers"):
        load_spec(write(), CATALOGUE, ['train.optimizer.type="Adamw"'])


def test_a_message_shows_no_control_characters_and_has_no_line_of_more_than_500_characters(write):
    for key, value in (("a\x1b[31m\u202e", 1), ("k" * 5000, 2), ("searcher", "x\ny" * 900), ("seed", "9\x00" * 900)):
        with pytest.raises(UserError) as raised:
            load_spec(write(tomli_w.dumps({**tomli.loads(SPEC), key: value})), CATALOGUE)
        lines = str(raised.value).split("\n")
        assert all(line.isprintable() and len(line) <= 500 for line in lines), lines
    assert str(Fault("a\x1bb\nc", hint="d\re")) == "a\\x1bb\nc\n  d\n  e"


def test_a_space_of_another_backbone_is_one_message(write):
    assert faults(write(SPEC, "stem = [1, 2]\n[[cells]]\nops = [1, 2]\n")) == [
        ("space.toml", 1, "", "this is a space of the backbone 'cells', not of 'net'")]  # fmt: skip


def test_spaces_that_corenas_comes_with_have_names(write, tmp_path):
    assert space_file("ofa-mobilenetv3", tmp_path).read_text() == (SPECS / "space" / "ofa-mobilenetv3.toml").read_text()
    (tmp_path / "bignas").mkdir()
    assert space_file("bignas", tmp_path) == SPECS / "space" / "bignas.toml"
    (tmp_path / "resnet").write_text("")
    assert space_file("resnet", tmp_path) == tmp_path / "resnet"
    assert space_file("resnet.toml", tmp_path) == tmp_path / "resnet.toml"
    assert space_file("space/resnet.toml", tmp_path) == SPECS / "space" / "resnet.toml"  # as READMEs write it
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "resnet.toml").write_text("")
    assert space_file("space/resnet.toml", tmp_path) == tmp_path / "space" / "resnet.toml"
    [(file, line, key, message)] = faults(write(SPEC.replace('"space.toml"', '"ofa-mobilenetv4"')))
    assert (file, line, key, message) == ("spec.toml", 5, "space.file", "no space 'ofa-mobilenetv4'")
    assert [key for *_, key, _ in faults(write(SPEC.replace('"space.toml"', '"zennet-tiny"')))][:1] != ["space.file"]


# -- overrides --------------------------------------------------------------------------------------------------------


def test_a_format_that_nothing_writes_is_a_mistake(write):
    assert faults(write(SPEC + '[export]\nformats = ["pt2",\n "onnx"]')) == [
        ("spec.toml", 23, "export.formats[1]", "no format 'onnx'")]  # fmt: skip


@pytest.mark.parametrize(
    "override", ["seed=-1", "seed=4294967296", "name='..'", "name='a/b'", "train.schedule.warmup=inf"]
)
def test_what_a_run_could_not_use_is_a_mistake(write, override):
    assert places(write(), override) == [("--set", None, override.split("=")[0])]


def test_what_nothing_in_a_run_would_look_at_is_refused(write):
    idle = SPEC.replace('"oneshot"', '"scores"')  # no supernet, no retraining: an evaluator may train archs alone
    load_spec(write(idle), CATALOGUE)  # `--set algorithm=…` is no mistake: that there is a mutator is told
    without = idle.replace('mutator = "uniform"\n', "").replace('"accuracy"', '"untrained"')
    assert places(write(without)) == [("spec.toml", 13, "train")]
    load_spec(write(without.replace("epochs = 2", "workers = 2").replace("schedule", "# ")), CATALOGUE)
    space = SPACE + '"spec:train.epochs" = [1, 2]\n'
    assert places(write(SPEC, space)) == [("space.toml", 5, "spec:train.epochs")]
    load_spec(write(SPEC.replace('"accuracy"', '"trains"'), space), CATALOGUE)
    load_spec(write(without.replace('"untrained"', '"accuracy"'), space), CATALOGUE)


def test_archs_race_by_one_objective_where_an_evaluator_lets_them(write):
    one = SPEC.replace(', { metric = "flops", weight = 1e-9 }', "")
    with_racer = one.replace('"accuracy"', '"races"')
    for text, race in (("0.9", Racing(0.9)), ("{best = 3}", Racing(best=3))):
        assert load_spec(write(with_racer), CATALOGUE, [f"search.racing={text}"])[0].search.race == race
    assert load_spec(write(one), CATALOGUE)[0].search.race is None
    wrong = [("--set", None, "search.racing")]
    assert places(write(one), "search.racing=0.9") == wrong
    assert places(write(SPEC.replace('"accuracy"', '"races"')), "search.racing=0.9") == wrong
    assert places(write(with_racer), "search.pareto=true", "search.racing=0.9") == wrong
    assert places(write(with_racer), "search.racing=1.5") == [("--set", None, "search.racing.confidence")]


def test_overrides_change_any_key(write):
    spec, _ = load_spec(write(), CATALOGUE, [
        "train.epochs=5", "seed = 9", "mutator.n=4", "backbone.mult=0.5", "evaluators.0.n=7", "name=x",
        "train.optimizer.type=Adam", "train.optimizer.lr=1e-3", 'searcher="random"', "search.objectives=['flops']",
        "space.fix.depth=1", "search.constraints.params=5M", "'train'.batch_size=7",
    ])  # fmt: skip
    assert (spec.train.epochs, spec.seed, spec.mutator, spec.backbone.mult) == (5, 9, Uniform(4), 0.5)
    assert spec.train.batch_size == 7
    assert (spec.evaluators, spec.name, spec.searcher) == ((Options(7),), "x", Random())
    assert spec.train.optimizer == {"type": "Adam", "lr": 1e-3}
    assert (spec.search.objectives, [*spec.space["depth"].choices]) == (("flops",), [1])
    assert spec.search.constraints["params"] == "5M"


def test_mistakes_in_overrides_are_told_as_such(write):
    path = write()
    assert places(path, "train.epochs=-1") == [("--set", None, "train.epochs")]
    assert places(path, "train.schedule={warmup=true}") == [("--set", None, "train.schedule.warmup")]
    assert places(path, "evaluators.0.n=-1") == [("--set", None, "evaluators.0.n")]
    assert places(path, "seed.x=1") == [("--set", None, "seed.x")]
    assert places(path, "evaluators.5.n=1") == [("--set", None, "evaluators.5.n")]
    assert places(path, "evaluators.².n=1") == [("--set", None, "evaluators.².n")]
    assert places(path, "space.fix.blocks.0.kernel=9") == [("--set", None, "space.fix.blocks.0.kernel")]
    assert places(path, "Train.epochs=1") == [("--set", None, "Train")]
    assert "found '1\\nseed = 4'" in faults(path, "train.epochs=1\nseed = 4")[0][3]
    assert places(path, "mutator=unifrom") == [("--set", None, "mutator.type")]
    for item in ("seed", "=3", "a..b=1", ".=1"):
        assert "KEY=VALUE" in faults(path, item)[0][3]


def test_mistakes_in_a_space_file_that_was_set_stand_in_that_file(write, tmp_path):
    (tmp_path / "other.toml").write_text("\nwidth = [1, 1]")
    assert places(write(), "space=other.toml") == [("other.toml", 2, "width")]


# -- robustness -------------------------------------------------------------------------------------------------------

VALUES = [0, -1, 1.5, 10**30, float("nan"), float("inf"), True, "", "x", "60%", "200M", [], {}, [1], ["x"], [[1]], [{}],
          {"type": "int"}, {"type": 3}, {"a": {"b": 1}}, "uniform", "space.toml", "a\0b", [None][:0], "²"]  # fmt: skip


def mutate(table, rng):
    """Change, rename, remove or add something somewhere in a table."""
    nodes = [table]
    for node in nodes:
        nodes += [item for item in (node.values() if isinstance(node, dict) else node) if isinstance(item, dict | list)]
    node = rng.choice([node for node in nodes if node])
    key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
    what = rng.choice(["value", "value", "value", "rename", "remove", "add", "swap"])
    if what == "value":
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif what == "remove":
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(rng.choice(VALUES)))
    elif what == "rename":
        node[rng.choice([f"{key}s", key[:-1], "type", "when", "blocks", "depth"])] = node.pop(key)
    elif what == "swap":
        other = rng.choice([*node])
        node[key], node[other] = node[other], node[key]
    else:
        node[rng.choice(["x", "type", "fix", "narrow", "file", "options", "min"])] = copy.deepcopy(rng.choice(VALUES))


@pytest.mark.filterwarnings("error")
def test_a_broken_spec_is_answered_and_never_crashes(write, tmp_path):
    rng = random.Random(0)
    good = tomli.loads(SPEC)
    good["train"] |= {"optimizer": {"type": "AdamW", "lr": 0.1, "betas": [0.9, 0.99]}}
    good["search"] |= {"pareto": {"metric": "flops", "width": "1M"}}
    fine = 0
    for _ in range(600):
        spec, space = copy.deepcopy(good), tomli.loads(SPACE)
        if rng.random() < 0.5:
            spec["space"] = space if rng.random() < 0.7 else {"file": "space.toml", "fix": {"depth": 1},
                                                             "narrow": {"width": [8]}}  # fmt: skip
        for _ in range(rng.randrange(1, 4)):
            mutate(spec if rng.random() < 0.6 else space, rng)
        try:
            path = write(tomli_w.dumps(spec), tomli_w.dumps(space))
            loaded, _ = load_spec(path, CATALOGUE)
            tomli_w.dumps(loaded.to_table(CATALOGUE))
            fine += 1
        except UserError as error:
            wrong = [fault for fault in error.faults if not fault.file or not fault.message]
            fine -= 1000 if wrong or not error.faults else 0
    assert 20 < fine < 400


def test_reading_a_spec_imports_no_torch(write):
    code = """
import sys
sys.path[:0] = [sys.argv[1]]
from corenas.plugins import load_catalogue
from corenas.run.spec import load_spec
try:
    load_spec(sys.argv[2], load_catalogue(found=[]))
except Exception as error:
    print(type(error).__name__, len(error.faults))
sys.exit("torch" in sys.modules)
"""
    root = str(SimpleNamespace(**vars(sys.modules["corenas"])).__file__).rsplit("/", 2)[0]
    path = write(SPEC + "[train.optimizer]\ntype = 'Adan'\n".replace("train.opt", "train . opt"))
    done = subprocess.run([sys.executable, "-c", code, root, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "UserError"), done.stderr


GIVEN = SPEC.replace('backbone = "net"', 'backbone = { type = "giving", mult = 2.0 }')


@pytest.mark.parametrize(("space", "choices"), [
    ("", {"a.width": (4, 8), "b.0.width": (4, 8, 32)}),
    ('space = { narrow = { "*.width" = [4, 8] } }', {"a.width": (4, 8), "b.0.width": (4, 8)}),
    ('space = { fix = { "b.0.width" = 32 } }', {"a.width": (4, 8), "b.0.width": (32,)}),
    ('space = { "a.width" = [4, 8] }', {"a.width": (4, 8)}),
])  # fmt: skip
def test_a_backbone_may_give_the_space_that_a_spec_leaves_out_or_narrows(space, choices, write):
    spec, _ = load_spec(write(GIVEN.replace('space = "space.toml"', space)), CATALOGUE)
    assert {variable.key: variable.choices for variable in spec.space.variables} == choices
    again = SearchSpace.from_table(spec.to_table(CATALOGUE)["space"])
    assert again.variables == spec.space.variables


@pytest.mark.parametrize(("space", "mult", "message"), [
    ('space = { fix = { "c.width" = 4 } }', "2.0", "spec.toml:5: space.fix.c.width: no variable 'c.width'"),
    ("", "3.0", "spec.toml:4: backbone.mult: this network has no space"),
    ('space = { file = "nowhere.toml" }', "2.0", "space.file: no such space file"),
])  # fmt: skip
def test_mistakes_about_a_given_space_are_told_with_their_line(space, mult, message, write):
    text = GIVEN.replace('space = "space.toml"', space).replace("2.0", mult)
    with pytest.raises(UserError) as error:
        load_spec(write(text), CATALOGUE)
    assert message in str(error.value)
