"""How the order of networks by `latency` agrees with that of each back end's own benchmark tool, on this machine.

Networks of one space are spread over a factor of 3: of their latency, by a short look at more of them, with torch; of
their flops where each is exported, which takes seconds. The tools are torch.utils.benchmark (eager), onnxruntime's
profile of its runs, and OpenVINO's benchmark_app; each sees every network in three rounds, so that drift of the machine
is no difference between networks. Kendall's tau is to be at least 0.9. A profile adds some microseconds to each layer:
networks of a tenth of a millisecond want `--images 16` there.

    python tests/benchmarks/latency.py --backend eager
    python tests/benchmarks/latency.py --backend onnxruntime --images 16
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.utils.benchmark import Timer

from corenas.contracts import ExportContext, Measured
from corenas.ranking import kendall_tau, tau_interval
from corenas.run.prepare import prepare
from corenas.run.spec import open_spec
from corenas_evaluator_latency import Latency
from corenas_evaluator_latency.backends import Runtime
from corenas_evaluator_latency.measured import deployed
from corenas_evaluator_latency.timing import timed
from corenas_exporter_onnx import Onnx


def spread(figures, n):
    """Numbers of n figures in equal steps from a third of the largest to it."""
    wanted = np.geomspace(max(figures) / 3, max(figures), n)
    left = [*range(len(figures))]
    return [left.pop(int(np.abs(np.array(figures)[left] - each).argmin())) for each in wanted]


def spread_archs(context, cost, n, backend, given):
    """Archs that are spread by the latency of a short look, or by their flops."""
    archs = cost.space.decode(cost.space.draw(np.random.default_rng(0), 2000))
    flops = [each["flops"] for each in cost.of(archs)]
    if backend == "eager":
        archs = [archs[at] for at in spread(flops, 5 * n)]
        runners = [Runtime(threads=1).runner(deployed(context, arch), given) for arch in archs]
        flops = [timing.ms for timing in timed(runners, warmup=3, runs=5, rounds=5, spread=1e9)]
    return [archs[at] for at in spread(flops, n)]


def by_torch(network, example, folder):
    """Milliseconds by torch.utils.benchmark."""
    run = Runtime(threads=1).runner(network, example)
    timer = Timer("run()", globals={"run": run}, num_threads=1)
    return lambda seconds: 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def by_onnxruntime(network, example, folder):
    """Milliseconds by onnxruntime's own profile."""
    path = Onnx().write(network, folder, ExportContext(example))

    def measured(seconds):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix, options.log_severity_level = f"{folder}/profile", 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: torch.randn(example.shape).numpy()}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        return float(np.median([event["dur"] for event in events if event["name"] == "model_run"])) / 1e3

    return measured


def by_openvino(network, example, folder):
    """Milliseconds by OpenVINO's benchmark_app."""
    path = Onnx().write(network, folder, ExportContext(example))
    tool = Path(sys.executable).parent / "benchmark_app"
    shape = f"[{','.join(map(str, example.shape))}]"
    command = [tool, "-m", path, "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1", "-nthreads", "1",
               "-shape", shape, "-t"]  # fmt: skip

    def measured(seconds):
        line = [*map(str, command), str(max(1, round(seconds)))]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return float(re.search(r"Median:\s+([\d.]+) ms", done.stdout)[1])

    return measured


TOOLS = {"eager": by_torch, "onnxruntime": by_onnxruntime, "openvino": by_openvino}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("spec", nargs="?", default="spec/quickstart.toml")
    parser.add_argument("--backend", action="append", choices=TOOLS)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--images", type=int, default=1, help="in a batch")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.4, help="of the back end's tool, for each network and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(open_spec(options.spec)[0], data=False)
    context = prepared.evaluator_context(prepared.supernet if prepared.has_supernet else None)
    example = Runtime(images=options.images).given(prepared.task.example)
    for backend in options.backend or ["eager", "onnxruntime"]:
        archs = spread_archs(context, prepared.cost, options.networks, backend, example)
        flops = [each["flops"] for each in prepared.cost.of(archs)]
        print(f"{options.spec}, {len(archs)} networks of {min(flops):,} to {max(flops):,} flops", flush=True)
        settings = Latency(backend=backend, threads=1, images=options.images, rounds=options.rounds, spread=1e9)
        ours = [found for found in settings.start(context)(archs, 1.0) if isinstance(found, Measured)]
        ms = [found.metrics["latency_ms"] for found in ours]
        wide = max(found.extra["latency_ms"]["spread"] for found in ours)
        with tempfile.TemporaryDirectory() as root:
            tools = []
            for number, arch in enumerate(archs):
                (folder := Path(root) / str(number)).mkdir()
                tools.append(TOOLS[backend](deployed(context, arch), example, folder))
            rounds = [[tool(options.seconds) for tool in tools] for _ in range(3)]
        theirs = np.median(rounds, 0).tolist()
        tau = kendall_tau(ms, theirs)
        low, high = tau_interval(tau, len(ms))
        print(f"{backend:12} {'flops':>12} {'ours, ms':>10} {'its tool':>10}")
        for row in zip(flops, ms, theirs, strict=True):
            print(f"{'':12} {row[0]:12,} {row[1]:10.3f} {row[2]:10.3f}")
        ratio = max(ms) / min(ms)
        print(
            f"{backend:12} tau {tau:.2f} ({low:.2f} to {high:.2f}), a factor of {ratio:.1f}, widest spread {wide:.0%}"
        )


if __name__ == "__main__":
    main()
