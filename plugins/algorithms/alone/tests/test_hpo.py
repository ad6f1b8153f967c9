"""The search of hyper-parameters in spec/hpo.toml, with a searcher that is always there."""

from pathlib import Path

from corenas.run.prepare import prepare
from corenas.run.spec import open_spec

SPEC = Path(__file__).parents[4] / "spec" / "hpo.toml"


def test_the_spec_is_right_and_each_choice_lands_in_its_place():
    spec = open_spec(SPEC, ["searcher=random"])[0]
    prepared = prepare(spec, data=False, weights=False)
    assert prepared.stages == ["search", "retrain"]
    assert {key.partition(":")[0] for key in spec.space.keys} == {"spec"}
    arch = spec.space.smallest()
    changed = spec.overridden(arch)
    assert changed.train.optimizer["lr"] == arch["spec:train.optimizer.lr"]
    assert changed.train.batch_size == 16
    assert changed.task.label_smoothing == 0
    assert spec.overridden(spec.space.default()) == spec  # it starts from the spec's own settings
