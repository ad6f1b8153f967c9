"""The store: what is kept comes back, whole or not at all."""

import math
import random
import sqlite3
import subprocess
import sys

import pytest

from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.store import Store


def trial(i, **more):
    return Trial(Arch({"width": i, "op": "conv", "ratio": 0.1 * i, "se": i % 2 == 0}), **more)


TRIALS = [
    trial(3, metrics={"top1": 0.1 + 0.2, "flops": 12}, seconds=0.25),
    trial(1, metrics={"top1": math.nan, "loss": math.inf}, state="infeasible", error="not flops at most 3"),
    trial(2, state="failed", error="Boom: Ω"),
    trial(10),
]


def test_trials_come_back_in_order_with_every_digit(tmp_path):
    store = Store(tmp_path / "run.sqlite")
    for made in TRIALS:
        store.add(made)
    for reader in (store, Store(tmp_path / "run.sqlite"), Store(tmp_path / "run.sqlite", readonly=True)):
        found = reader.trials()
        assert [t.arch for t in found] == [t.arch for t in TRIALS]
        assert [repr(t) for t in found] == [repr(t) for t in TRIALS]  # NaN is no equal of itself
        assert [[*t.arch] for t in found] == [[*t.arch] for t in TRIALS]
        assert [type(v) for t in found for v in t.arch.values()] == [type(v) for t in TRIALS for v in t.arch.values()]


def test_an_arch_is_stored_once(tmp_path):
    store = Store(tmp_path / "run.sqlite")
    store.add(TRIALS[0])
    with pytest.raises(UserError):
        store.add(TRIALS[0])
    assert len(store.trials()) == 1


def test_notes_come_back_and_the_last_one_counts():
    store = Store()
    assert store.get("a") is None
    assert store.get("a", 3) == 3
    store.set("a", {"x": [1, 2.5, None, "é"]})
    assert store.get("a") == {"x": [1, 2.5, None, "é"]}
    store.set("a", None)
    assert store.get("a", 3) is None


def test_what_a_killed_process_stored_is_there(tmp_path):
    code = """
import os, sys
from pathlib import Path
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.store import Store
store = Store(Path(sys.argv[1]))
for i in range(5):
    store.add(Trial(Arch({"i": i})))
    store.set("last", i)
store._db.execute("INSERT INTO notes VALUES ('half', '1')")
os._exit(9)
"""
    path = tmp_path / "run.sqlite"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    store = Store(path)
    assert [t.arch["i"] for t in store.trials()] == [*range(5)]
    assert (store.get("last"), store.get("half")) == (4, None)


def test_a_store_that_is_not_there_or_none_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        Store(tmp_path / "run.sqlite", readonly=True)
    assert not (tmp_path / "run.sqlite").exists()
    (tmp_path / "text").write_text("no database, but long enough to have a header " * 50)
    for readonly in (False, True):
        with pytest.raises(UserError, match="text: cannot use this database"):
            Store(tmp_path / "text", readonly).trials()
        with pytest.raises(UserError, match="cannot use this database"):
            Store(tmp_path, readonly).trials()
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(UserError, match="empty, or of another version"):
        Store(tmp_path / "other", readonly=True).trials()
    with pytest.raises(UserError):
        Store(tmp_path / "none" / "run.sqlite")
    (deep := tmp_path.joinpath(*["x" * 250] * 2)).mkdir(parents=True)
    with pytest.raises(UserError, match="SQLite takes no path of more than 500 bytes"):
        Store(deep / "run.sqlite")


def damaged(path, *statements):
    db = sqlite3.connect(path)
    with db:
        for statement in statements:
            db.execute(statement)
    db.close()


def test_rows_of_other_types_are_told_with_the_part_that_is_lost(tmp_path):
    path = tmp_path / "run.sqlite"
    for part, read, bad in (
        ("trials", Store.trials, ["arch = '[1]'", "arch = '{\"a\": [1]}'", "metrics = '3'", "seconds = 'x'",
         "state = 'won'", "fidelity = 'all'", "fidelity = 7", "extra = 'null'", "error = X'00'", "arch = X'ff'",
         "metrics = '{'", "metrics = CAST(X'7bff7d' AS TEXT)"]),
        ("curves", lambda store: store.curve("train"), ["figures = '[]'", "figures = '{\"loss\": \"low\"}'"]),
        ("notes `result`", lambda store: store.get("result"), ["value = '{}'", "value = '3'", "value = 'nul'",
         """value = '{"best": {"arch": {}, "metrics": []}, "front": [], "table": [], "trials": 3}'"""]),
        ("notes `seconds`", lambda store: store.get("seconds"), ["value = '[1]'", "value = X'ff00'"]),
    ):  # fmt: skip
        for change in bad:
            path.unlink(missing_ok=True)
            store = Store(path)
            store.add(TRIALS[0])
            store.point("train", 1, {"loss": 2.5})
            store.set("seconds", {"train": 3})
            found = {"arch": {"a": 1}, "metrics": {"top1": 3.5}}
            store.set("result", {"best": found, "front": [found], "table": [found], "trials": 1})
            assert read(store)
            store.close()
            damaged(path, f"UPDATE {part.split()[0]} SET {change}")
            with pytest.raises(UserError) as raised:
                read(Store(path, readonly=True))
            message = f"this database is damaged: of its {part} not all can be read"
            assert raised.value.faults[0].message == message, change


def test_flipped_bits_are_a_message(tmp_path):
    path = tmp_path / "run.sqlite"
    store = Store(path)
    for i in range(200):
        store.add(trial(i, metrics={"top1": i / 7}))
        store.set(f"note {i}", [i])
        store.point("train", i, {"loss": float(i)})
    store.close()
    whole, rng = path.read_bytes(), random.Random(0)
    told = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 5, 200])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = Store(path, readonly=True)
            found.trials(), found.curve("train"), [found.get(f"note {i}") for i in range(200)]
        except UserError:
            told += 1
    assert told > 20


def test_reading_leaves_nothing_beside_the_file_so_that_its_medium_need_not_be_writable(tmp_path):
    path = tmp_path / "a b#?.sqlite"
    writer = Store(path)
    writer.add(TRIALS[0])
    live = Store(path, readonly=True)
    writer.add(TRIALS[1])
    assert [trial.arch for trial in live.trials()] == [trial.arch for trial in TRIALS[:2]]
    live.close()
    writer.close()
    assert [*tmp_path.iterdir()] == [path]
    reader = Store(path, readonly=True)
    assert [trial.arch for trial in reader.trials()] == [trial.arch for trial in TRIALS[:2]]
    assert [*tmp_path.iterdir()] == [path]


def test_a_closed_store_says_so():
    store = Store()
    store.close()
    for use in (store.trials, lambda: store.set("a", 1), lambda: store.get("a"), lambda: store.add(TRIALS[0])):
        with pytest.raises(UserError, match="closed"):
            use()
