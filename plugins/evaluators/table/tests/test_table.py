import csv
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corenas.cli import main
from corenas.contracts import Failure
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import ARCHS, evaluator_checks
from corenas.testing.small import make_space, some_archs
from corenas_evaluator_table import Column, Table

SPACE = SearchSpace.from_table({
    "width": [4, 8], "op": ["conv", "skip"], "se": [True, False], "depth": [1, 2], "block": {"kernel": [3, 5]},
    "ratio": {"type": "float", "low": 0.1, "high": 1.0, "log": True},
})  # fmt: skip
METRICS = ("top1", Column("latency", "ms", "min"))


def rows_of(archs, metrics):
    return [{**arch, **row} for arch, row in zip(archs, metrics, strict=True)]


def as_csv(folder, rows):
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "t.csv")


def as_sqlite(folder, rows, name="archs"):
    with sqlite3.connect(folder / "t.sqlite") as connection:
        columns = ", ".join('"' + key + '"' for key in rows[0])
        connection.execute(f"create table {name} ({columns})")
        marks = ", ".join("?" * len(rows[0]))
        connection.executemany(f"insert into {name} values ({marks})", [[*row.values()] for row in rows])
    connection.close()
    return str(folder / "t.sqlite")


def as_parquet(folder, rows):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(rows).to_parquet(folder / "t.parquet")
    return str(folder / "t.parquet")


class Context:
    space = SPACE


def started(file, metrics=METRICS, space=SPACE, **options):
    context = Context()
    context.space = space
    return Table(file, metrics, **options).start(context)


@pytest.fixture(scope="module")
def measured():
    archs = [*dict.fromkeys(SPACE.decode(SPACE.draw(np.random.default_rng(0), 40)))]
    rng = np.random.default_rng(1)
    return archs, [{"top1": rng.uniform(60, 80), "latency": float(rng.integers(1, 99))} for _ in archs]


@pytest.fixture(scope="module")
def table_of_the_small_network(tmp_path_factory):
    archs = [*dict.fromkeys([*ARCHS, *some_archs(make_space(), 300)])]
    metrics = [{"top1": float(i), "latency": 1.0 / (i + 1)} for i in range(len(archs))]
    return Table(as_csv(tmp_path_factory.mktemp("table"), rows_of(archs, metrics)), METRICS)


@pytest.mark.parametrize("check", evaluator_checks)
def test_conforms(check, table_of_the_small_network):
    check(table_of_the_small_network)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_evaluator_table")


@pytest.mark.parametrize("write", [as_csv, as_sqlite, as_parquet])
def test_every_kind_of_file_gives_what_was_written(write, tmp_path, measured):
    archs, metrics = measured
    assert started(write(tmp_path, rows_of(archs, metrics)))(archs[::-1], 1.0) == metrics[::-1]


def test_an_arch_without_a_row_and_one_without_a_number_fail_with_the_reason(tmp_path, measured):
    archs, metrics = measured
    rows = rows_of(archs[1:], metrics[1:])
    rows[0]["latency"] = ""
    file = as_csv(tmp_path, rows)
    found = started(file)(archs[:3], 0.5)
    assert found == [
        Failure(f"{file} has no row of this arch"),
        Failure(f"{file} has no number for its latency"),
        metrics[2],
    ]


def test_what_is_inactive_may_be_empty_and_rows_outside_the_space_do_not_count(tmp_path):
    rows = [
        {"width": 4, "depth": 1, "blocks.0.kernel": 3, "blocks.1.kernel": "", "top1": 1},
        {"width": 4.0, "depth": 2, "blocks.0.kernel": 3, "blocks.1.kernel": "", "top1": 2},  # no whole arch
        {"width": 6, "depth": 1, "blocks.0.kernel": 3, "blocks.1.kernel": 5, "top1": 3},  # no such width
        {"width": 8.0, "depth": 1, "blocks.0.kernel": 5, "blocks.1.kernel": 5, "top1": 4},
        {"width": 8, "depth": 1, "blocks.0.kernel": 5, "blocks.1.kernel": 3, "top1": 6},  # the same arch
    ]
    space = SearchSpace.from_table({"width": [4, 8], "depth": [1, 2], "block": {"kernel": [3, 5]}})
    lookup = started(as_csv(tmp_path, rows), ("top1",), space)
    found = dict(zip(space, lookup([*space], 1.0), strict=True))
    assert {arch["width"]: row for arch, row in found.items() if not isinstance(row, Failure)} == {
        4: {"top1": 1.0},
        8: {"top1": 5.0},
    }


@pytest.mark.parametrize(("change", "text"), [
    (lambda row: row.pop("width"), "there is no column 'width'"),
    (lambda row: row.pop("top1"), "there is no column 'top1'"),
    (lambda row: row.update(width=5), "none of its 2 rows is an arch of this space"),
])  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(change, text, tmp_path, measured):
    rows = rows_of(*measured)[:2]
    for row in rows:
        change(row)
    with pytest.raises(UserError, match=text):
        started(as_csv(tmp_path, rows))


def test_files_that_cannot_be_read_are_refused(tmp_path, measured):
    as_sqlite(tmp_path, rows_of(*measured))
    sqlite = as_sqlite(tmp_path, rows_of(*measured), "more")
    (tmp_path / "no.db").write_text("width,top1\n" * 50)
    (tmp_path / "short.csv").write_text(",".join(rows_of(*measured)[0]) + "\n4\n")
    (tmp_path / "no.csv").write_bytes(b"width,top1\n\xff\xfe,1\n")
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    for file, options, text in [
        (sqlite, {}, "which table is meant?"),
        (sqlite, {"table": "mroe"}, "did you mean 'more'"),
        (tmp_path / "no.db", {}, "no SQLite file"),
        (tmp_path / "short.csv", {}, "1 cells under 9 columns"),
        (tmp_path / "no.csv", {}, "this is no CSV"),
        (tmp_path / "no.parquet", {}, "Parquet"),
        (tmp_path / "not there.csv", {}, "looked for in the working directory"),
        (tmp_path / "t.xls", {}, "expected .csv"),
        (tmp_path / "short.csv", {"table": "a"}, "`table` is for SQLite files"),
    ]:
        with pytest.raises(UserError, match=text):
            started(str(file), **options)
    assert started(sqlite, table="more")(measured[0], 1.0) == measured[1]


SPEC = """
evaluators = [{ type = "table", file = "%s", metrics = ["top1", { metric = "flops", direction = "min" }] }]
searcher = { type = "evolution", population = 8, parents = 3, mutation = 4, crossover = 4 }
%s
[space]
width = [1, 2, 3, 4]
kernel = [3, 5, 7]
expand = [3, 4, 6]
[search]
trials = 30
objectives = ["top1"]
constraints = { flops = 60 }
"""


@pytest.fixture
def spec_of_a_table(tmp_path):
    space = SearchSpace.from_table({"width": [1, 2, 3, 4], "kernel": [3, 5, 7], "expand": [3, 4, 6]})
    metrics = [{"top1": a["width"] + a["kernel"], "flops": a["width"] * a["kernel"] * a["expand"]} for a in space]
    file = Path(as_csv(tmp_path, rows_of(space, metrics)))
    (tmp_path / "spec.toml").write_text(SPEC % (file.as_posix(), ""))
    return tmp_path, file


def test_a_spec_without_a_network_is_a_search_alone(spec_of_a_table, capsys):
    folder, _ = spec_of_a_table
    spec, run = str(folder / "spec.toml"), folder / "run"
    assert main(["check", spec]) == 0
    assert "36 archs" in capsys.readouterr().out
    assert main(["run", spec, "--out", str(run), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert best["metrics"]["flops"] <= 60
    trials = Store(run / "run.sqlite", readonly=True).trials()
    assert len(trials) == 30
    assert {trial.state for trial in trials} == {"done", "infeasible"}
    assert best["metrics"]["top1"] == max(trial.metrics["top1"] for trial in trials if trial.ok) == 9.0
    assert sorted(file.name for file in (run / "best").iterdir()) == ["arch.toml", "cost.json"]
    assert main(["report", str(run)]) == 0
    for command in (["cost", spec], ["export", str(run), "--to", str(folder / "to")]):
        assert main(command) == 2
        assert "nothing here has a network" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "text"), [
    ("[train]\nepochs = 3", "train: nothing here has a network"),
    ("mutator = 'uniform'", "mutator: nothing here has a network"),
    ("algorithm = 'spos'", "backbone: required key is missing"),
    ("task = { type = 'classification', data = 'mnist5k' }", "algorithm: required key is missing"),
])  # fmt: skip
def test_a_network_needs_task_backbone_and_algorithm_and_without_one_much_is_for_nothing(
    more, text, spec_of_a_table, capsys
):
    folder, file = spec_of_a_table
    (folder / "spec.toml").write_text(SPEC % (file.as_posix(), more))
    assert main(["check", str(folder / "spec.toml")]) == 2
    assert text in capsys.readouterr().err


def test_an_evaluator_that_wants_a_network_hears_that_there_is_none(spec_of_a_table, capsys):
    folder, _ = spec_of_a_table
    text = (folder / "spec.toml").read_text().replace("evaluators = [", 'evaluators = ["synflow", ')
    (folder / "spec.toml").write_text(text)
    assert main(["run", str(folder / "spec.toml"), "--out", str(folder / "run")]) == 2
    assert "wants a network, and this spec has none" in capsys.readouterr().err


def test_looking_up_needs_no_torch(tmp_path, measured):
    as_csv(tmp_path, rows_of(*measured))
    script = "import sys; sys.path[:] = %r; import corenas_evaluator_table.lookup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script % sys.path], check=False).returncode == 0


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    options = [load_catalogue().options("evaluators", spec["evaluators"][0]) for spec in fragments]
    assert options == [Table("measured.csv", ("top1", Column("flops", direction="min")))]
