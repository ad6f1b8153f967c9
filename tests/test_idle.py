"""What a spec says for nothing is told, with the reason, by `corenas check` and by the run: options of every kind."""

import pytest
import tomli_w
from toys import DIGITS

from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import load_spec

CATALOGUE = load_catalogue()
NO_SEARCH = ["algorithm=plain", "mutator={}", "searcher={}"]
CELLS = ["space=darts-tiny", "backbone.type=darts"]


def notes(folder, *sets):
    """What is told of a spec with some keys set, tables that are set to {} left out; no data is read."""
    table = {key: item for key, item in DIGITS.items() if f"{key}={{}}" not in sets}
    (folder / "spec.toml").write_text(tomli_w.dumps(table))
    spec, _ = load_spec(folder / "spec.toml", CATALOGUE, [item for item in sets if not item.endswith("={}")])
    return prepare(spec, data=False, weights=False).notes


def test_what_is_all_of_use_is_not_told_of(tmp_path):
    assert notes(tmp_path) == []
    assert notes(tmp_path, "train.stop.archs=5", "train.validate=3", "search.trust.archs=5", "train.schedule.warmup=1",
                 "mutator={type='flops_uniform', bins=3}",
                 "searcher={type='evolution', population=29, mutation=9, crossover=9}",
                 "backbone.drop_path=0.1", "backbone.drop_path_stages=1",
                 "backbone.transforms=true", "task.size=12", "task.crop=0.5") == []  # fmt: skip


@pytest.mark.parametrize(("sets", "text"), [
    # settings
    ([*NO_SEARCH, "search={}"], "evaluators does nothing: this algorithm has no search"),
    ([*NO_SEARCH, "evaluators={}"], "search does nothing: this algorithm has no search"),
    ([*NO_SEARCH, "evaluators={}", "search={}", "executor=processes"], "executor does nothing: this algorithm has no"),
    (["export.front=true"], "export.front does nothing: without `search.pareto`"),
    (["search.pareto=true"], "search.pareto does nothing: of one objective"),
    (["search.objectives=[{metric='top1', weight=2.0}]"], "weight does nothing: there is one objective"),
    (["train.validate=4"], "train.validate = 4 does nothing: there are 3 epochs"),
    (["train.epochs=1", "train.stop.archs=5"], "train.stop does nothing: one epoch has none before"),
    (["train.ema=0.0"], "train.ema = 0 does nothing"),
    (["train.schedule={type='constant', floor=0.1}"], "train.schedule.floor does nothing: constant has none"),
    (["train.schedule={type='cosine', every=2.0}"], "train.schedule.every does nothing: cosine has none"),
    (["train.schedule={type='StepLR', options={step_size=1}, decay=0.5}"], "schedule.decay does nothing: StepLR"),
    (["train.schedule.warmup=3"], "the learning rate never comes to its own"),
    (["retrain.train.validate=1"], "retrain.train.validate does nothing: a network that is trained alone"),
    (["retrain.train.stop.archs=5"], "retrain.train.stop does nothing: a network that is trained alone"),
    (["search.trust={archs=5, train={stop={archs=5}}}"], "search.trust.train.stop does nothing"),
    (["algorithm=alone", "mutator={}", "evaluators=['stand_alone']", "train.validate=1"], "train.validate does"),
    (["calibration={batches=0, batch_size=9}"], "calibration does nothing: with no batches"),
    (["space=vit-tiny", "backbone=vit", "calibration.batches=3"], "calibration does nothing: this network has no"),
    # components
    (["task.verify=all"], "task.verify = 'all' does nothing: this data is no image files"),
    (["task.skip_broken=true"], "task.skip_broken = True does nothing"),
    (["task.bits=12"], "task.bits = 12 does nothing"),
    (["task.max_pixels=9"], "task.max_pixels = 9 does nothing"),
    (["task.crop=0.5"], "task.crop = 0.5 does nothing: images have that size already"),
    (["task.auxiliary=0.4"], "task.auxiliary = 0.4 does nothing: the backbone gives no features before the last"),
    ([*CELLS, "backbone.auxiliary=true", "algorithm=darts", "mutator={}", "searcher={}", "evaluators={}", "search={}"],
     "features before the last (1) are for nothing"),
    (["mutator={type='attentive', bins=5, width='10k'}"], "mutator.bins = 5 does nothing: `width` says"),
    (["mutator={type='attentive', after=5}"], "mutator.after = 5 does nothing: no predictor is fitted"),
    (["mutator={type='attentive', rule='worst-up', candidates=1}"], "mutator.rule = 'worst-up' does nothing: of one"),
    (["mutator={type='attentive', paths=2, tries=7}"], "mutator.tries = 7 does nothing: two paths are the largest"),
    (["mutator={type='flops_uniform', bins=5, width='10k'}"], "mutator.bins = 5 does nothing: `width` says"),
    (["algorithm={type='ofa', kd_ratio=0.0, batch_statistics=true}"], "algorithm.batch_statistics = True does nothing"),
    (["searcher={type='evolution', population=30, mutation=0, crossover=9}"], "searcher does nothing: 30 archs at"),
    (["searcher={type='evolution', population=9, mutation=0, crossover=9, mutation_prob=0.2}"], "mutation_prob = 0.2"),
    (["searcher={type='nsga2', population=30}"], "searcher does nothing: 30 archs at random are all 30 trials"),
    (["searcher={type='regularized', population=40}"], "searcher does nothing: 40 archs"),
    (["searcher={type='bayesian', initial=30}"], "searcher does nothing: 30 archs"),
    (["searcher={type='predictor', initial=30}"], "searcher does nothing: 30 archs"),
    (["searcher={type='predictor', mutation=0.0, mutation_prob=0.2}"], "searcher.mutation_prob = 0.2 does nothing"),
    (["searcher={type='additive', initial=30}"], "searcher does nothing: 30 archs"),
    (["searcher={type='coarse_to_fine', coarse=1.0, parents=9}"], "searcher.parents = 9 does nothing"),
    (["executor={type='dask', scheduler='tcp://h:1', workers=3}"], "executor.workers = 3 does nothing: the running"),
    (["executor={type='dask', queue={type='slurm'}, threads=3}"], "executor.threads = 3 does nothing: jobs of a queue"),
    (["executor={type='ray', address='auto', workers=3}"], "executor.workers = 3 does nothing: the running cluster"),
    (["evaluators=['accuracy', {type='latency', device='cuda', threads=2}]"], "evaluators[1].threads = 2 does nothing"),
    (["backbone.drop_path_stages=1"], "backbone.drop_path_stages = 1 does nothing: there is no drop path"),
    (["backbone.resize_mode=nearest"], "backbone.resize_mode = 'nearest' does nothing: this space has no `resolution`"),
    ([*CELLS, "backbone.resize_mode=nearest", "algorithm=spos"], "backbone.resize_mode = 'nearest' does nothing"),
    (["retrain.backbone={type='mobilenetv3', drop_path_stages=1}"], "retrain.backbone.drop_path_stages = 1 does"),
])  # fmt: skip
def test_what_does_nothing_is_told_with_the_reason(tmp_path, sets, text):
    told = notes(tmp_path, *sets)
    assert len([note for note in told if text in note]) == 1, told


@pytest.mark.parametrize(("sets", "key"), [
    (["train.accumulate=33"], "train.accumulate"),
    (["algorithm=bignas", "mutator=sandwich", "distiller={type='features', teacher_at=[0]}"], "distiller.teacher_at"),
    (["distiller=kl", "teacher.from=nowhere"], "teacher.from"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path, sets, key):
    with pytest.raises(UserError) as caught:
        notes(tmp_path, *sets)
    assert [fault.dotted for fault in caught.value.faults] == [key]
