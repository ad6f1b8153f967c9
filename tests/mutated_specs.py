"""Breaks specs and spaces at random and asks `corenas check` of each: status 0 or 2, no traceback, under 5 seconds of
processor time, in lines of at most 500 characters that control no terminal; with --json one object. Of
those that are fine and small some run.

By hand:  uv run python tests/mutated_specs.py --n 10000 --try --run 300
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import attrs
import tomli
import tomli_w

from corenas import load_catalogue
from corenas.cli import main
from corenas.errors import UserError
from corenas.run.spec import load_spec

SPECS = Path(__file__).parent.parent / "spec"
METHODS = ("quickstart", "attentivenas", "cream", "darts", "fairnas", "hpo", "ofa", "spos", "zennas")
SPACES = {"resnet": "resnet-tiny", "vit": "vit-tiny", "genet": "genet-tiny", "zennet": "zennet-tiny"}
"""Backbones that the quickstart has to search as well."""
MORE = {
    "retrain": {"begin": "supernet", "train": {"epochs": 1, "optimizer": {"type": "AdamW", "lr": 0.01}}, "seeds": 2},
    "search": {
        "trials": 2, "batch": 1, "pareto": {"metric": "flops", "width": "1M"}, "budget": "1m", "trust": {"archs": 5},
        "objectives": [{"metric": "top1", "direction": "max"}, "flops"], "constraints": [{"flops": "90%"}, {}],
    },
    "executor": {"type": "processes", "workers": 1},
    "evaluators": ["accuracy", {"type": "latency", "rounds": 3, "runs": 1, "warmup": 1}, "memory"],
    "export": {"formats": [{"type": "onnx"}, "python"], "front": True},
    "train": {"epochs": 1, "batch_size": 32, "ema": 0.9, "accumulate": 2, "precision": "bfloat16"},
}  # fmt: skip
"""Tables that may stand in a spec in place of its own."""
LONGEST, MOST_SECONDS = 500, 5
VALUES = [
    0, -1, 1, 2, 3, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63 - 1, -(2**63), 10**30, 10**400, 10**4, 0.5,
    1e-300,
    True, False, "", "x\u2603", "top1", "flops", "200M", "-5%", "1e400%", "nan", [], {}, [[]], [{}], [1, 2], ["a"],
    [1, 1], {"type": "x"}, {"type": 1}, {"type": "int", "low": 1, "high": 10**7}, {"type": "int", "low": 5, "high": 1},
    {"type": "float", "low": 0, "high": 1}, {"type": "float", "low": 0.0, "high": 1.0, "step": 1e-9},
    {"type": "categorical", "choices": []}, {"type": "categorical", "choices": [1, "a"]}, {"a": {"b": [1, {"e": 2}]}},
    *tomli.loads("a = 2020-01-01\nb = 12:00:00").values(), [3, 5, 7, 9], "mobilenetv3", "bignas", "spos", "uniform",
    "x" * 5000, [*range(2000)], [2.5], ["1", "2"], "\u202e", "../..", "~/x", "cuda", "/etc/passwd", "/dev/zero", "20m",
    "-1s", "\x1b[2J\n" * 300, functools.reduce(lambda x, i: [x], range(200), 1), "a\x00b",
    "/proc/self/mem", "\u0442op1",
    *tomli.loads("a = 1979-05-27T07:32:00-08:00\nb = 0xff\nc = -nan").values(), "9" * 5000, 1.0, -0.0, 5e-324,
]  # fmt: skip
KEYS = [
    "type", "width", "depth", "kernel", "expand", "fix", "narrow", "file", "blocks", "block", "resolution", "\xfc",
    "a.b", "lr", "", "pareto", "name", "device", "export", "formats", "mutator", "data", "root", "when", "stride",
    "supernet", "from", "retrain", "executor", "distiller", "budget", "spec:train.epochs", "spec:x", "a\x1b[2J",
    "trust", "racing", "teacher", "begin", "front", "plugins", "weights", "search", "train", "task", "workers",
    "amp", "ema",
]  # fmt: skip
PLACES = {
    "algorithms": "algorithm", "mutators": "mutator", "searchers": "searcher", "distillers": "distiller",
    "backbones": "backbone", "tasks": "task", "evaluators": "evaluators", "exporters": "export",
    "executors": "executor",
}  # fmt: skip
"""Where components stand in a spec, by their kinds."""
NETS = Path(__file__).parent.parent / "plugins/mutables/conversion/tests/nets.py"
CONVERTED = {
    "seed": 1, "space": {}, "algorithm": "bignas", "mutator": {"type": "sandwich", "paths": 3}, "searcher": "random",
    "backbone": {"type": "converted", "model": f"{NETS}:tiny", "image": [3, 8, 8]}, "evaluators": ["accuracy"],
    "train": {"epochs": 1, "batch_size": 64},
}  # fmt: skip
SWEEP = {
    "input": ["archs.csv"], "error": "top1", "direction": "max", "unit": "%", "complexity": ["flops"], "seed": 0,
    "normalise": {"by": "flops", "bins": 4, "min_per_bin": 2}, "bootstrap": {"fraction": 0.5}, "narrow": {"alpha": 0.1},
}  # fmt: skip
COMPARE = {
    "spec": str(SPECS / "quickstart.toml"), "seeds": 1, "set": ["task.data=digits", "train.epochs=1"], "budget": 1e12,
    "reference": {"archs": 4, "seeds": 1, "kept": "kept.json"}, "train": ["train.epochs=1"], "baselines": False,
    "apart": {"darts": "no"}, "methods": {"a": {}, "b": {"set": ['mutator="uniform"']}},
}  # fmt: skip
LOOKALIKES = str.maketrans("aeopcx", "\u0430\u0435\u043e\u0440\u0441\u0445")
JUNK = [
    "\u0000",
    "]",
    "}",
    '"',
    "'''",
    " = ",
    "\xe9",
    "[[[",
    "\ntrain.epochs = 3",
    "\n[train]",
    "\n[[train]]",
    "\n[space.space]",
    "\nx = " + "[" * 5000 + "]" * 5000,
    "\nx = " + "{a=" * 3000 + "1" + "}" * 3000,
    "\n" + "a." * 3000 + "b = 1",
    "\n[" + "a." * 500 + "b]",
    "\nx = 0b" + "1" * 20_000,
    "\nx = 1e" + "9" * 5000,
    "\nseed = 1\nseed = 2",
    "\r",
    "\ufeff",
    '\n"" = 1',
    '\n"a\\u0000b" = 1',
]


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


def component(rng):
    """The table of a component that is installed, whichever, with some of its options, and its place in a spec."""
    components = load_catalogue().components
    kind, name = rng.choice(sorted(key for key in components if key[0] in PLACES))
    table = {"type": name}
    for option in attrs.fields(components[kind, name].cls):
        if option.init and rng.random() < 0.4:
            usual = option.default
            usual = getattr(usual, "factory", lambda usual=usual: usual)() if usual is not attrs.NOTHING else 1
            plain = isinstance(usual, bool | int | float | str)
            near = (
                [usual, -usual, usual * 2, usual / 3, 0, 10**6, str(usual)]
                if isinstance(usual, int | float)
                else [usual]
            )
            found = rng.choice(near if plain and rng.random() < 0.6 else VALUES)
            table[option.name.rstrip("_")] = copy.deepcopy(found)
    place = PLACES[kind]
    return place, {"evaluators": ["accuracy", table], "export": {"formats": [table]}}.get(place, table)


def disguised(text, rng):
    """A text as another program might have saved it: bytes."""
    how = rng.randrange(8)
    if how < 3:
        return ("# caf\xe9\n" + text).encode(["utf-16", "latin-1", "utf-32"][how], "replace")
    content = text.encode("utf-8", "surrogatepass")
    if how == 3:
        return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    if how == 4:
        return content.replace(b"\n", b"\r")
    if how == 5:
        return content[: rng.randrange(len(content) + 1)]
    if how == 6:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        lines[at] = lines[at].translate(LOOKALIKES)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    found = bytearray(content or b"x")
    for _ in range(rng.choice([1, 3, 30])):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


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


@functools.cache
def bases():
    """Pairs of tables that are to be broken, a spec's and its space's: as they are written, and with all defaults."""
    written = [tomli.loads((SPECS / f"{name}.toml").read_text()) for name in METHODS]
    for backbone, space in SPACES.items():
        mine = copy.deepcopy(written[0]) | {"space": f"space/{space}.toml"}
        written.append(mine | {"backbone": {"type": backbone, "in_channels": 1}, "search": {"trials": 2}})
    written.append(copy.deepcopy(CONVERTED))
    found, catalogue = [], load_catalogue()
    for spec in map(_small, written):
        space = spec["space"]
        if isinstance(space, str):
            space = tomli.loads((SPECS / space).read_text())
        found.append((spec, space))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "it.toml"
            file.write_text(tomli_w.dumps(spec | {"space": space}))
            whole = load_spec(file, catalogue)[0].to_table(catalogue)
        found.append((whole, whole["space"]))
    return found


def _small(spec):
    """A spec's table, of a run of seconds."""
    spec["task"] = {"type": "classification", "data": "digits", "valid": 200, "test": 200, "augment": []}
    spec["search"] = spec.get("search", {}) | {"trials": 2, "batch": 2}
    spec["export"], spec["calibration"] = {"formats": ["safetensors"]}, {"batches": 1, "batch_size": 32}
    for phase in spec["algorithm"].get("phases", ()) if isinstance(spec["algorithm"], dict) else ():
        phase["epochs"] = 1
    for table in (spec, spec.get("retrain", {})):
        if "train" in table:
            table["train"] |= {"epochs": 1}
        if "task" in table:
            table["task"] = spec["task"]
    return spec


def broken(rng):
    """The contents of a spec and of its space, one of them changed."""
    spec, space = map(copy.deepcopy, rng.choice(bases()))
    if rng.random() < 0.3:
        table = rng.choice([*MORE])
        spec[table] = copy.deepcopy(MORE[table])
    if rng.random() < 0.25:
        place, table = component(rng)
        spec[place] = table
    how, spec["space"] = rng.random(), "space.toml"
    if how < 0.1:
        spec["space"] = space
    if how < 0.8:
        for _ in range(rng.choice([1, 1, 2, 3])):
            mutate(spec if how < 0.45 else space, rng)
    texts = [tomli_w.dumps(spec), tomli_w.dumps(space)]
    if how < 0.03:
        return [disguised(text, rng) for text in texts]
    texts = [scramble(text, rng) if how > bound else text for text, bound in zip(texts, (0.8, 0.9), strict=True)]
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def broken_table(word, table, rng):
    """The content of a file of one table that has been changed."""
    whole = {word: copy.deepcopy(table)}
    for _ in range(rng.choice([1, 1, 2])):
        mutate(whole, rng)
    text = tomli_w.dumps(whole)
    return scramble(text, rng).encode("utf-8", "surrogatepass") if rng.random() < 0.2 else text.encode()


class TooLongError(BaseException):
    """It takes many minutes."""


def command(*arguments, minutes=10):
    """Exit status or traceback, stdout, stderr, and seconds of processor time of a command."""

    def stop(number, frame):
        raise TooLongError

    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60 * minutes)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([*map(str, arguments)])
        except BaseException:
            status = traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue(), time.process_time() - start


def faults(status, out, err, seconds, as_json):
    """What is wrong with how a command answered."""
    wrong = [] if status in (0, 2) else [f"status {status}"]
    lines = err.splitlines() + ([] if as_json else out.splitlines())
    wrong += [f"line {line[:100]!r} of {len(line)}" for line in lines if len(line) > LONGEST or not line.isprintable()]
    if "Traceback" in out + err:
        wrong.append("a traceback")
    if seconds > MOST_SECONDS:
        wrong.append(f"{seconds:.1f} s")
    if status == 2 and not err.strip():
        wrong.append("no word")
    if as_json:
        try:
            assert isinstance(json.loads(out), dict)
        except Exception:
            wrong.append(f"no JSON: {out[:200]!r}")
    return wrong


def ran(folder):
    """What is wrong with the run of a spec that was found to be fine; None where it is not small."""
    status, out, *_ = command("check", "spec.toml", "--json")
    needs = json.loads(out)["estimate"] if status == 0 else None
    if needs is None or not needs["seconds"] or sum(needs["seconds"].values()) > 5:
        return None
    wrong = faults(*command("run", "spec.toml", "--out", "run", "--json")[:3], 0, True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return wrong


def run(n, seed, folder, ways=(["--no-data"], ["--no-data", "--json"]), runs=0):
    """Check so many mutated specs in a folder, and run some.

    Returns how many had which status, or ran, the slowest, and what was wrong.
    """
    rng, counts, slowest, wrong = random.Random(seed), Counter(), 0.0, []
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    command("check", SPECS / "quickstart.toml", "--no-data")  # imports torch
    for i in range(n):
        while True:
            try:
                texts = broken(rng)
            except Exception:  # a writer of TOML cannot write it
                continue
            break
        for name, text in zip(("spec.toml", "space.toml"), texts, strict=True):
            (folder / name).write_bytes(text)
        how = rng.choice(ways)
        status, out, err, seconds = command("check", "spec.toml", *how)
        found = faults(status, out, err, seconds, "--json" in how)
        counts[status if status in (0, 2) else "other"] += 1
        slowest = max(slowest, seconds)
        if status == 0 and counts["ran"] < runs and (of_run := ran(folder)) is not None:
            counts["ran"] += 1
            found += of_run
        if found:
            (folder / f"wrong-{seed}-{i}").mkdir()
            for name in ("spec.toml", "space.toml"):
                shutil.copy(folder / name, folder / f"wrong-{seed}-{i}")
            wrong.append(f"wrong-{seed}-{i}: {' '.join(how)}: {'; '.join(found)}\n{err[-300:]}")
            print(wrong[-1], flush=True)
    return counts, slowest, wrong


def run_tables(n, seed, folder):
    """The same for tables [sweep] and [compare]; nothing is trained."""
    rng, counts, wrong = random.Random(f"tables {seed}"), Counter(), []
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    rows = [f"{a},{b},{1000 * a * b},{rng.uniform(60, 90)}" for a in range(1, 9) for b in range(1, 9)]
    (folder / "archs.csv").write_text("\n".join(["width,depth,flops,top1", *rows]))
    running = importlib.import_module("corenas_tool_compare.running")
    running._run = lambda *given: (_ for _ in ()).throw(UserError("this would run"))
    for i in range(n):
        word, table = rng.choice([("sweep", SWEEP), ("compare", COMPARE)])
        try:
            (folder / "table.toml").write_bytes(broken_table(word, table, rng))
        except Exception:  # a writer of TOML cannot write it
            continue
        status, out, err, seconds = command(word, "table.toml", "--out", "out", "--json")
        found = faults(status, out, err, 0 if status == 0 else seconds, True)  # pictures take their time
        counts[word, status if status in (0, 2) else "other"] += 1
        shutil.rmtree(folder / "out", ignore_errors=True)
        if found:
            shutil.copy(folder / "table.toml", folder / f"wrong-{word}-{seed}-{i}.toml")
            wrong.append(f"wrong-{word}-{seed}-{i}: {'; '.join(found)}\n{err[-300:]}")
            print(wrong[-1], flush=True)
    return counts, 0.0, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--try", dest="tries", action="store_true", help="try steps, as `check` does by itself")
    parser.add_argument("--run", type=int, default=0, help="how many run of those that are fine")
    parser.add_argument("--tables", action="store_true", help="tables of sweeps and comparisons instead")
    parser.add_argument("--to", type=Path, default=None, help="the folder for those that are answered wrongly")
    given = parser.parse_args()
    ways = [["--no-data"], ["--no-data", "--json"]]
    ways += [[], ["--json"]] if given.tries else []
    if given.tables:
        run = lambda n, seed, place, *_: run_tables(n, seed, place)  # noqa: E731
    start, place = time.process_time(), given.to or Path(tempfile.mkdtemp())
    counts, slowest, wrong = run(given.n, given.seed, place, ways, given.run)
    print(dict(counts), f"slowest {slowest:.1f} s, in all {time.process_time() - start:.0f} s; {len(wrong)} in {place}")
    sys.exit(bool(wrong))
