"""Breaks specs and spaces at random and asks `corenas check` of each: status 0 or 2, no traceback, under 5 seconds, in
lines of at most 500 characters that control no terminal.

By hand:  uv run python tests/mutated_specs.py --n 2000
"""

import argparse
import contextlib
import copy
import functools
import io
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import tomli
import tomli_w

from corenas.cli import main

SPECS = Path(__file__).parent.parent / "spec"
SPEC, SPACE = (SPECS / "quickstart.toml").read_text(), (SPECS / "space" / "mobilenetv3-small-images.toml").read_text()
VALUES = [
    0, -1, 1, 2, 3, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63 - 1, -(2**63), 10**30, 10**4, 0.5, 1e-300,
    True, False, "", "x\u2603", "top1", "flops", "200M", "-5%", "1e400%", "nan", [], {}, [[]], [{}], [1, 2], ["a"],
    [1, 1], {"type": "x"}, {"type": 1}, {"type": "int", "low": 1, "high": 10**7}, {"type": "int", "low": 5, "high": 1},
    {"type": "float", "low": 0, "high": 1}, {"type": "float", "low": 0.0, "high": 1.0, "step": 1e-9},
    {"type": "categorical", "choices": []}, {"type": "categorical", "choices": [1, "a"]}, {"a": {"b": [1, {"e": 2}]}},
    *tomli.loads("a = 2020-01-01\nb = 12:00:00").values(), [3, 5, 7, 9], "mobilenetv3", "bignas", "spos", "uniform",
    "x" * 5000, [*range(2000)], [2.5], ["1", "2"], "\u202e", "../..", "/etc/passwd", "/dev/zero", "20m", "-1s",
    "\x1b[2J\n" * 300, functools.reduce(lambda x, i: [x], range(200), 1),
]  # fmt: skip
KEYS = [
    "type", "width", "depth", "kernel", "expand", "fix", "narrow", "file", "blocks", "block", "resolution", "\xfc",
    "a.b", "lr", "", "pareto", "name", "device", "export", "formats", "mutator", "data", "root", "when", "stride",
    "supernet", "from", "retrain", "executor", "distiller", "budget", "spec:train.epochs", "spec:x", "a\x1b[2J",
]  # fmt: skip
JUNK = ["\u0000", "]", "}", '"', "'''", " = ", "\xe9", "[[["]


def places(table):
    """Every (container, key) of a nest."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [place for key, item in items for place in [(table, key), *places(item)]]


def mutate(table, rng):
    """Change one thing somewhere."""
    found = places(table)
    if not found:
        return
    container, key = rng.choice(found)
    value, other = container[key], copy.deepcopy(rng.choice([*VALUES, rng.choice(found)[1]]))
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 or (kind == 2 and isinstance(container, list)):
        container[key] = other
    elif kind == 2:
        container[rng.choice(KEYS)] = container.pop(key)
    elif kind == 3 and isinstance(container, dict):
        container[rng.choice(KEYS)] = other
    elif kind == 4:
        container[key] = rng.choice([[value], {"x": value}, {"type": value}])
    elif isinstance(value, str):
        container[key] = rng.choice([value[:-1], value.upper(), value + "x", " " + value])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = rng.choice([-value, value * 1000, value + 0.5, str(value), value * 10**9, 0])


def scramble(text, rng):
    """Change some lines, so that it may be no TOML any more."""
    lines = text.split("\n")
    for _ in range(rng.randrange(1, 4)):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        change = rng.randrange(4)
        if change == 0:
            lines[i] += rng.choice(JUNK)
        elif change == 1:
            lines.insert(i, lines[j])
        elif change == 2:
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines[i] = lines[i].replace("=", rng.choice([":", "==", "= ["]))
    return "\n".join(lines)


def broken(rng):
    """The texts of a spec and of its space, one of them changed."""
    spec, space = tomli.loads(SPEC) | {"space": "space.toml"}, tomli.loads(SPACE)
    how = rng.random()
    if how < 0.1:
        spec["space"] = space
    if how < 0.8:
        for _ in range(rng.choice([1, 1, 2, 3])):
            mutate(spec if how < 0.45 else space, rng)
    texts = [tomli_w.dumps(spec), tomli_w.dumps(space)]
    return [scramble(text, rng) if how > bound else text for text, bound in zip(texts, (0.8, 0.9), strict=True)]


def check(folder, *options):
    """Exit status, what was said, and seconds."""
    said, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(["check", str(folder / "spec.toml"), *options])
        except BaseException:
            status = traceback.format_exc()
    return status, said.getvalue(), time.perf_counter() - start


def run(n, seed, folder):
    """Check so many mutated specs in a folder. Returns how often each status came, the slowest, and what was wrong."""
    rng, statuses, slowest, wrong = random.Random(seed), Counter(), 0.0, []
    os.chdir(folder)
    (folder / "spec.toml").write_text(SPEC.replace("space/", f"{SPECS}/space/"))
    assert check(folder, "--no-data")[0] == 0  # imports torch, which takes seconds on a machine that is busy
    for i in range(n):
        try:
            spec, space = broken(rng)
        except Exception:  # a writer of TOML cannot write it
            continue
        (folder / "spec.toml").write_text(spec, errors="surrogatepass")
        (folder / "space.toml").write_text(space, errors="surrogatepass")
        status, said, seconds = check(folder, *rng.choice([[], [], ["--json"], ["--no-data"]]))
        statuses[status if status in (0, 2) else "other"] += 1
        slowest = max(slowest, seconds)
        lines = said.splitlines() if status == 2 and not said.rstrip().endswith("}") else []  # JSON is one long line
        odd = [line for line in lines if len(line) > 500 or not line.isprintable()]
        if status not in (0, 2) or "Traceback" in said or seconds > 5 or not said.strip() or odd:
            (folder / f"wrong-{i}").mkdir()
            for name in ("spec.toml", "space.toml"):
                (folder / f"wrong-{i}" / name).write_bytes((folder / name).read_bytes())
            wrong.append(f"{i}: {seconds:.1f} s: {status} {said[-300:]}")
    return statuses, slowest, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    statuses, slowest, wrong = run(given.n, given.seed, Path(tempfile.mkdtemp()))
    print(dict(statuses), f"slowest {slowest:.1f} s", *wrong, sep="\n")
    sys.exit(bool(wrong))
