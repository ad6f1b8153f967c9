"""How the order of networks by `latency` agrees with that of each back end's own benchmark tool, on this machine.

Networks of one space are spread over a factor of 3 in flops. The tools are torch.utils.benchmark (eager), onnxruntime's
profile of its runs, and OpenVINO's benchmark_app. Kendall's tau is to be at least 0.9.

    python tests/benchmarks/latency.py --backend eager --backend onnxruntime
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
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
from corenas_exporter_onnx import Onnx


def spread_archs(cost, n):
    """Archs whose flops go in equal steps from a third of the most to the most."""
    archs = cost.space.decode(cost.space.draw(np.random.default_rng(0), 2000))
    flops = np.array([each["flops"] for each in cost.of(archs)])
    wanted = np.geomspace(flops.max() / 3, flops.max(), n)
    return [archs[int(np.abs(flops - each).argmin())] for each in wanted]


def by_torch(network, example, seconds):
    """Milliseconds by torch.utils.benchmark."""
    run = Runtime(threads=1).runner(network, Runtime().given(example))
    return 1e3 * Timer("run()", globals={"run": run}, num_threads=1).blocked_autorange(min_run_time=seconds).median


def by_onnxruntime(network, example, seconds):
    """Milliseconds by onnxruntime's own profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Onnx().write(network, Path(folder), ExportContext(example))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix, options.log_severity_level = f"{folder}/profile", 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: torch.randn(example.shape).numpy()}
        for _ in range(int(200 * seconds)):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return float(np.median([event["dur"] for event in events if event["name"] == "model_run"])) / 1e3


def by_openvino(network, example, seconds):
    """Milliseconds by OpenVINO's benchmark_app."""
    with tempfile.TemporaryDirectory() as folder:
        path = Onnx().write(network, Path(folder), ExportContext(example))
        tool = Path(sys.executable).parent / "benchmark_app"
        shape = f"[{','.join(map(str, example.shape))}]"
        command = [tool, "-m", path, "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1", "-nthreads", "1",
                   "-t", str(max(1, round(seconds))), "-shape", shape]  # fmt: skip
        done = subprocess.run(map(str, command), capture_output=True, text=True, check=True)
    return float(re.search(r"Median:\s+([\d.]+) ms", done.stdout)[1])


TOOLS = {"eager": by_torch, "onnxruntime": by_onnxruntime, "openvino": by_openvino}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("spec", nargs="?", default="spec/quickstart.toml")
    parser.add_argument("--backend", action="append", choices=TOOLS)
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="of the back end's tool, for each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(open_spec(options.spec)[0], data=False)
    context = prepared.evaluator_context(prepared.supernet if prepared.has_supernet else None)
    example = prepared.task.example
    archs = spread_archs(prepared.cost, options.networks)
    flops = [each["flops"] for each in prepared.cost.of(archs)]
    print(f"{options.spec}, {len(archs)} networks of {min(flops):,} to {max(flops):,} flops")
    for backend in options.backend or ["eager", "onnxruntime"]:
        settings = Latency(backend=backend, threads=1, rounds=options.rounds, spread=1e9)
        ours = [found for found in settings.start(context)(archs, 1.0) if isinstance(found, Measured)]
        ms = [found.metrics["latency_ms"] for found in ours]
        wide = max(found.extra["latency_ms"]["spread"] for found in ours)
        theirs = [TOOLS[backend](deployed(context, arch), example, options.seconds) for arch in archs]
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
