"""Six times killed, and the same in the end: trials, best arch, weights, curves."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
KILLS = 6


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been():
    # The script forks before torch has computed anything, which a test process has done long ago.
    command = [sys.executable, "tests/kills.py", "spec/quickstart.toml", "--kills", str(KILLS), "--short"]
    command += ["--set", "train.ema=0.99", "--set", 'export.formats=["safetensors", "python", "pt2"]']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    moments = [line.partition(": ")[2] for line in lines if line.startswith("kill ")]
    assert last == f"{KILLS} kills, the same outcome bit for bit"
    assert len(moments) == KILLS
    assert any(moment.startswith("0 trials") and "supernet.pt" in moment for moment in moments), "killed in training"
    assert any(not moment.startswith("0 trials") for moment in moments), "killed in the search"
