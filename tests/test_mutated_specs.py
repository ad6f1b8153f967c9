"""Whatever is wrong with a spec, the answer is a message, soon."""

import mutated_specs
import pytest

pytestmark = pytest.mark.slow


def test_mutated_specs_are_answered_with_a_message_or_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statuses, slowest, wrong = mutated_specs.run(150, seed=1, folder=tmp_path)
    assert not wrong, "\n".join(wrong)
    assert statuses[2] > 100
    assert slowest < 5
