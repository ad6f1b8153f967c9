"""Every benchmark runs, with its smallest settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = (
    "train.epochs=1", "train.batch_size=128", "search.trials=2", "calibration.batches=1", "task.data=digits",
    "task.valid=200", "task.test=200", "space.narrow.stages.*.depth=[1]", 'export.formats=["safetensors"]',
)  # fmt: skip
SMALLEST = {
    "conversion.py": ["--archs", "1", "--image", "64", "torchvision:squeezenet1_1"],
    "shrink.py": ["--seeds", "0", "--epochs", "1", "1", "1", "--trials", "2", "--sizes", "1"],
    "cost.py": ["--archs", "200", "spec/space/mobilenetv3-small-images.toml"],
    "loop.py": ["--trials", "10", "--cases", "table"],
    "make_table.py": ["--check"],
    "searcher_overhead.py": ["--trials", "20", "random", "nsga2"],
    "bayesian.py": ["--seeds", "2", "--trials", "30", "--landscapes", "table"],
    "searchers.py": ["--seeds", "2", "--trials", "10", "20", "--landscapes", "table", "--searchers", "local"],
    "executors.py": ["--trials", "4", "--seconds", "0.1", "--rounds", "1", "processes"],
    "latency.py": ["--networks", "2", "--rounds", "3", "--seconds", "0.1", "--backend", "eager"],
    "slicing.py": ["--rounds", "1", "--images", "2x32", "fairnas"],
    "reference.py": ["spec/quickstart.toml", *(f"--set={item}" for item in QUICK)],
    "startup.py": ["1"],
    "switching.py": ["--rounds", "1"],
    "together.py": ["--trials", "2", *(f"--set={item}" for item in QUICK)],
    "windows.py": ["--archs", "100", "--spaces", "bignas"],
    "quickstart.py": ["--archs", "1", "0", *(f"--set={item}" for item in QUICK)],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_runs_with_its_smallest_settings(path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *SMALLEST[path.name]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
