"""Whatever is wrong with a spec, the answer is a message, soon."""

import mutated_specs
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(8))
def test_mutated_specs_are_answered_with_a_message_or_are_fine(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, _, wrong = mutated_specs.run(125, seed, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert counts[2] > 70
    assert counts[0] >= 1
