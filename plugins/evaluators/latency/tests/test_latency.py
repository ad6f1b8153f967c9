import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from corenas.cli import main
from corenas.contracts import Evaluator, Failure, Measured
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import context, evaluator_checks, timing_evaluator_checks
from corenas.testing.small import make_space, some_archs
from corenas_evaluator_latency import Latency, LatencyTable
from corenas_evaluator_latency.backends import Runtime
from corenas_evaluator_latency.lookup import Block, Table, fitted
from corenas_evaluator_latency.measured import deployed
from corenas_evaluator_latency.table import Maker, cut, parts_of
from corenas_evaluator_latency.timing import timed

CATALOGUE = load_catalogue()
QUICK = {"warmup": 1, "runs": 3, "rounds": 3, "spread": 1e9}  # this machine runs other tests meanwhile
ARCHS = some_archs(make_space(), 3)

# -- the clock --------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that things move: each takes its time, at a speed that drifts; every first run after another is slow."""

    def __init__(self, drift=0.0, noise=0.0):
        self.now, self.last, self.drift, self.noise = 0.0, None, drift, noise
        self.log, self.rng = [], np.random.default_rng(0)

    def thing(self, seconds):
        def run():
            cold = 10 * seconds if self.last is not run else 0.0
            jitter = 1 + self.noise * self.rng.random()
            self.now += (seconds * jitter + cold) * (1 + self.drift * self.now)
            self.last = run
            self.log.append(seconds)

        return run

    def timed(self, seconds, **settings):
        settings = {"warmup": 2, "runs": 5, "rounds": 9, "spread": 0.1, **settings}
        return timed([self.thing(each) for each in seconds], clock=lambda: self.now, **settings)


def test_a_latency_is_that_of_a_run_after_others_of_the_same_network():
    timings = Machine().timed([0.001, 0.002, 0.003])
    assert [timing.ms for timing in timings] == pytest.approx([1, 2, 3])
    assert [timing.rounds for timing in timings] == [9, 9, 9]
    assert all(timing.spread < 1e-9 for timing in timings)


def test_drift_of_the_machine_favours_none():
    machine = Machine(drift=1.0)  # a run takes twice as long after a second
    first, second = machine.timed([0.001, 0.001], spread=10.0)
    assert machine.now > 0.2
    assert first.ms == pytest.approx(second.ms, rel=0.03)
    turns = [at for at in range(1, len(machine.log)) if machine.log[at] != machine.log[at - 1]]
    assert machine.log.count(0.001) == 2 * (2 + 9 * 6)
    assert turns == []


def test_only_what_is_widely_spread_is_timed_again_and_stays_so_at_last():
    quiet, noisy = Machine(), Machine(noise=5.0)
    quiet.timed([0.001])
    (timing,) = noisy.timed([0.001])
    assert len(quiet.log) == 2 + 9 * 6
    assert len(noisy.log) == 2 + 3 * 9 * 6
    assert timing.spread > 0.1


# -- the evaluator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
def test_every_back_end_times_the_network_that_is_exported(backend):
    if importlib.util.find_spec(backend) is None and backend != "eager":
        pytest.skip(f"{backend} is not installed")
    found = Latency(backend=backend, **QUICK).start(context())(ARCHS[:1], 1.0)
    (measured,) = found
    assert isinstance(measured, Measured)
    facts = measured.extra["latency_ms"]
    assert 0.001 < measured.metrics["latency_ms"] < 1000
    assert (facts["backend"], facts["rounds"], facts["threads"]) == (backend, 3, torch.get_num_threads())
    assert facts["device"]


def test_more_work_takes_longer():
    class Task:
        example = torch.zeros(1, 64, 56, 56)

    def runner(width):
        return Runtime().runner(nn.Conv2d(64, width, 3).eval(), Task.example)

    slow, fast = timed([runner(256), runner(8)], warmup=2, runs=5, rounds=5, spread=1.0)
    assert slow.ms > 2 * fast.ms


def test_batch_norm_is_folded_and_the_outputs_stay():
    where = context()
    where.supernet.train()(where.task.data["train"][0])
    network = deployed(where, ARCHS[0])
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    images = where.task.data["train"][0][:4]
    plain = export_subnet(where.supernet.eval(), ARCHS[0], where.task.example).eval()
    torch.testing.assert_close(network(images), plain(images), atol=1e-5, rtol=1e-4)


def test_what_is_spread_too_widely_is_no_latency():
    (found,) = Latency(warmup=1, runs=1, rounds=5, spread=1e-9).start(context())(ARCHS[:1], 1.0)
    assert isinstance(found, Failure)
    assert "spread by" in found.reason


@pytest.mark.parametrize(("options", "message"), [
    (Latency(precision="int8"), "8 bits"),
    (Latency(device="cuda"), "no cuda device"),
    (Latency(backend="openvino", device="cuda"), "cuda"),
], ids=str)  # fmt: skip
def test_what_cannot_run_here_is_said_at_the_start(options, message):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        options.start(context())


def test_a_package_that_is_missing_is_named_with_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("corenas_evaluator_latency.backends.importlib.import_module", missing)
    with pytest.raises(UserError, match="not installed") as caught:
        Latency(backend="openvino").start(context())
    assert caught.value.faults[0].hint == 'pip install "corenas-evaluator-latency[openvino]"'


@pytest.mark.parametrize("check", timing_evaluator_checks)
def test_conforms(check):
    check(Latency(**QUICK))


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    where = context()
    return Maker(where, Runtime(), where.supernet, 1000).made(4)


def test_blocks_are_what_gates_open_and_what_lies_between_and_make_up_the_network():
    where = context()
    space = where.space
    parts = parts_of(where.supernet, space)
    names = [part.name for part in parts]
    assert len({*names}) == len(names)
    for arch in ARCHS:
        plain = deployed(where, arch)
        whole, blocks = cut(plain, names)
        assert {*blocks} <= {part.name for part in parts if part.gate(arch)}
        images = where.task.data["train"][0][:2]
        assert torch.equal(whole(images), plain(images))


def test_a_table_has_a_time_for_every_arch_and_none_for_what_does_not_run(table):
    where = context()
    space = where.space
    archs = [*{*space.decode(space.draw(np.random.default_rng(3), 200))}]
    latencies = table.on(space)(archs)
    assert all(ms > 0 for ms in latencies)
    parts = {part.name: part for part in parts_of(where.supernet, space)}
    for block in table.blocks:
        part = parts[block.name]
        rows = [dict(zip(block.choices, row, strict=True)) for row in itertools.product(*block.choices.values())]
        assert all(ms == 0 for row, ms in zip(rows, block.ms, strict=True) if not part.gate(row))
        assert any(ms > 0 for ms in block.ms)


def test_a_table_is_the_sum_of_the_blocks_that_run():
    space = SearchSpace.from_table({"width": [4, 8], "depth": [1, 2]})
    blocks = (
        Block("a", {"width": (4, 8)}, (1.0, 2.0)),
        Block("b", {"depth": (1, 2), "width": (4, 8)}, (0.0, 0.0, 3.0, 5.0)),
    )
    found = Table(blocks, 2.0, 0.5).on(space)(
        [space.arch({"width": w, "depth": d}) for w, d in [(4, 1), (8, 1), (4, 2), (8, 2)]]
    )
    assert found == [2.5, 4.5, 8.5, 14.5]
    narrow = space.narrow({"width": (8,)})
    assert Table(blocks, 2.0, 0.5).on(narrow)([narrow.largest()]) == [14.5]
    with pytest.raises(UserError, match="knows no width = 16"):
        Table(blocks, 1.0, 0.0).on(SearchSpace.from_table({"width": [8, 16], "depth": [1, 2]}))
    with pytest.raises(UserError, match="lacks"):
        Table(blocks, 1.0, 0.0).on(SearchSpace.from_table({"width": [4, 8]}))


def test_scale_and_base_are_those_of_the_line_and_never_below_the_blocks():
    assert fitted([1, 2, 3], [1.7, 2.9, 4.1]) == pytest.approx((1.2, 0.5))
    assert fitted([1, 2, 4], [1, 3, 8]) == (1.5, 0.0)


def test_a_file_gives_back_the_table_and_one_that_is_none_is_a_mistake(table, tmp_path):
    path = tmp_path / "latency.json"
    table.write(path)
    assert Table.read(path) == table
    broken = json.loads(path.read_text())
    broken["blocks"][0]["ms"].pop()
    for text in ("", "[]", '{"format": "other"}', json.dumps(broken)):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            Table.read(path)
        assert caught.value.faults[0].file == str(path)
    with pytest.raises(UserError, match="cannot read"):
        Table.read(tmp_path / "none.json")


def test_a_space_with_too_many_blocks_is_refused():
    where = context()
    with pytest.raises(UserError, match="kinds of blocks") as caught:
        Maker(where, Runtime(), where.supernet, 3).made(2)
    assert "--blocks" in caught.value.faults[0].hint


@pytest.mark.parametrize("check", evaluator_checks)
def test_the_table_conforms(check, table, tmp_path):
    table.write(tmp_path / "latency.json")
    check(LatencyTable(str(tmp_path / "latency.json")))


SMALLER = ["--set=space.narrow.stages.*.depth=[1]", "--set=space.narrow.stages.*.blocks.*.kernel=[3]"]


def test_the_command_writes_a_table_that_a_spec_can_search_by(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[4])
    path = tmp_path / "latency.json"
    arguments = ["latency-table", "spec/quickstart.toml", "--to", str(path), "--networks", "3", "--json", "--threads=1"]
    status = main([*arguments, *SMALLER])
    told = json.loads(capsys.readouterr().out)
    assert status == 0
    assert told["error"]["networks"] == 3
    assert math.isfinite(told["error"]["median"])
    assert told["backend"] == "eager"
    assert Table.read(path).error.networks == 3


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_evaluator_latency")


def test_the_readme_shows_specs_that_are_right():
    measured, looked_up = spec_fragments(Path(__file__).parents[1] / "README.md")
    found = [CATALOGUE.options("evaluators", item) for item in measured["evaluators"]]
    assert found[:2] == [Latency(threads=1), Latency(backend="onnxruntime", precision="int8", name="int8_ms")]
    assert CATALOGUE.options("evaluators", looked_up["evaluators"][0]) == LatencyTable("latency.json")
    assert all(isinstance(options, Evaluator) for options in found)


def test_a_name_that_is_none_is_a_mistake():
    with pytest.raises(UserError, match="letters"):
        structure({"name": "a b"}, Latency)
