"""What every task promises: `@pytest.mark.parametrize("check", task_checks)` in a plugin's tests.

Each check takes the options of a task, and by keyword a backbone with a space where the small one is none for its head:
`check(MyDetection(), backbone=TwoLevels(), space=SPACE)`.
"""

from __future__ import annotations

import builtins
import copy
import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from corenas.contracts import Backbone, InMemory, LiveTask, Metric, Task
from corenas.export import export_subnet
from corenas.loading import Batches
from corenas.mutable import apply, as_arguments
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.components import checks_of_any_component, global_generators_untouched
from corenas.testing.small import make_space, same, some_archs, supernet

SPLITS = ("train", "valid", "test")


def live(task: Task, seed: int = 0, data: bool = True) -> LiveTask:
    """The task with its data."""
    return task.start(np.random.default_rng(seed), data=data)


def network(task: LiveTask, backbone: Backbone | None = None, space: SearchSpace | None = None) -> Supernet:
    """The supernet of a task, on the small backbone unless there is another."""
    return supernet(space or make_space(), task, backbone)


def samples(task: LiveTask, split: str, augmented: bool = False, n: int = 6) -> list[Any]:
    """Some samples of a split, first and last."""
    dataset: Any = task.dataset(split, augmented)
    places = sorted({*range(min(n, len(dataset))), len(dataset) - 1})
    return [copy.deepcopy(dataset[i]) for i in places]  # whatever becomes of them


def batch_of(task: LiveTask, split: str = "train", n: int = 8) -> Any:
    """A batch as training has it."""
    return next(iter(Batches(task, split, n, torch.device("cpu"), limit=n)))


@contextmanager
def _no_file_is_opened() -> Iterator[None]:
    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError(f"reads {args[0]} although there is to be no data")

    with mock.patch.object(builtins, "open", refuse), mock.patch.object(io, "open", refuse):
        yield


def _bytes(sample: Any) -> bytes:
    first = sample[0] if isinstance(sample, tuple | list) else sample
    return first.numpy().tobytes() if isinstance(first, Tensor) else pickle.dumps(first)


def knows_its_shapes_and_metrics_without_data(task: Task, **on: Any) -> None:
    """`data=False` opens no file and knows example, metrics and head all the same; there are then no splits."""
    live(task, data=False)  # what is imported at the first start may be read
    with _no_file_is_opened():
        without = live(task, data=False)
    assert not without.splits
    full = live(task)
    assert full.example.shape == without.example.shape
    assert full.example.shape[0] == 1
    assert dict(full.metrics) == dict(without.metrics)
    assert full.metrics
    assert all(isinstance(metric, Metric) for metric in full.metrics.values())
    models = [network(either, **on) for either in (full, without)]
    assert same(models[0].state_dict(), models[1].state_dict())


def has_splits_of_the_sizes_that_it_says(task: Task, **on: Any) -> None:
    """There are "train", "valid" and "test", none of them is empty, and each has as many samples as `splits` says."""
    this = live(task)
    assert {*SPLITS} <= {*this.splits}
    for split, size in this.splits.items():
        assert size > 0, f"{split} is empty"
        assert len(this.dataset(split, False)) == size  # type: ignore[arg-type]


def keeps_its_splits_apart(task: Task, **on: Any) -> None:
    """Valid and test meet neither train nor each other, a few twins in the data itself apart (2%)."""
    this = live(task)
    found = {}
    for split in SPLITS:
        dataset: Any = this.dataset(split, False)
        found[split] = [_bytes(dataset[i]) for i in range(min(5000, len(dataset)))]
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        common = {*found[first]} & {*found[second]}
        assert len(common) <= 0.02 * len(found[second]), f"{len(common)} samples are in {first} and in {second}"


def cuts_the_same_splits_from_the_same_generator(task: Task, **on: Any) -> None:
    """Sizes and samples depend on the generator alone; no global one is touched."""
    with global_generators_untouched():
        one, two = live(task, seed=3), live(task, seed=3)
        assert dict(one.splits) == dict(two.splits)
        for split in one.splits:
            assert same(samples(one, split), samples(two, split))


def augments_by_torchs_generator_and_never_test(task: Task, **on: Any) -> None:
    """The same seed of torch's global generator gives the same sample; without augmentation any seed does."""
    this = live(task)

    def drawn(split: str, augmented: bool, seed: int) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return samples(this, split, augmented)

    with global_generators_untouched():
        for split in this.splits:
            assert same(drawn(split, True, 1), drawn(split, True, 1)), f"{split} draws from elsewhere"
            assert same(drawn(split, False, 1), drawn(split, False, 2)), f"{split} is random without augmentation"
        assert same(drawn("test", True, 1), drawn("test", False, 2)), "test data is augmented"


def has_data_sets_that_workers_can_read(task: Task, **on: Any) -> None:
    """A data set goes through pickle, and gives the same samples then; so does `tensors`, where it has them."""
    this = live(task)
    dataset: Any = this.dataset("train", False)
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == len(dataset)
    assert same(again[0], dataset[0])
    in_memory: Any = dataset
    tensors = in_memory.tensors() if isinstance(in_memory, InMemory) else None
    if tensors is not None:
        for i in (0, len(dataset) - 1):
            for own, whole in zip(dataset[i], tensors, strict=True):
                assert torch.equal(torch.as_tensor(own), whole[i])


def takes_the_features_of_a_backbone(task: Task, **on: Any) -> None:
    """Its head is part of a supernet: it works under every arch, and becomes plain torch with it."""
    this = live(task)
    model = network(this, **on).eval()
    for arch in some_archs(on.get("space", make_space()), 3):
        plain = export_subnet(model, arch, this.example)  # compares what they compute
        with torch.no_grad(), apply(model, arch):
            this.forward(plain, batch_of(this, "valid"))


def has_a_loss_to_train_by(task: Task, **on: Any) -> None:
    """`loss` is a finite scalar whose gradient reaches the head and the backbone; `forward` is what it takes.

    Inputs have the sizes of `example`.
    """
    this = live(task)
    model = network(this, **on).train()
    batch = batch_of(this)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    loss = this.loss(this.forward(model, batch), batch)
    example = as_arguments(this.example)[0]
    for given in seen:
        sizes, costed = ([[*x.shape[1:]] for x in inputs if isinstance(x, Tensor)] for inputs in (given, example))
        assert sizes == costed, f"gives a network {sizes} where its example, by which costs go, is {costed}"
    assert loss.dim() == 0
    assert math.isfinite(float(loss.detach()))
    loss.backward()
    for part in (model.backbone, model.head):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert any(gradient.any() for gradient in gradients), "the loss says nothing to a part of the network"
        assert all(gradient.isfinite().all() for gradient in gradients)


def its_loss_is_a_mean_over_samples(task: Task, **on: Any) -> None:
    """The loss of a batch of which each sample is there twice is that of the batch: parts of a batch are averaged."""
    this = live(task)
    model = network(this, **on).eval()
    batch = batch_of(this)
    twice = tree_map_only(Tensor, lambda x: torch.cat([x, x]), batch)
    once, again = (float(this.loss(this.forward(model, given), given).detach()) for given in (batch, twice))
    assert math.isclose(once, again, rel_tol=1e-3, abs_tol=1e-5), f"the loss of a batch is {once}, of it twice {again}"


def gives_logits_or_none(task: Task, **on: Any) -> None:
    """`logits` are one or more rows for each sample, with a graph to train by, or None where nothing is distilled."""
    this = live(task)
    model = network(this, **on).train()
    batch = batch_of(this, n=5)
    logits = this.logits(this.forward(model, batch))
    if logits is not None:
        assert logits.dim() == 2
        assert len(logits) % 5 == 0
        assert len(logits) > 0
        assert logits.is_floating_point()
        assert logits.requires_grad


def measures_what_its_metrics_say(task: Task, **on: Any) -> None:
    """A meter gives each metric, finite, and the same however the data is cut into batches; each meter begins anew."""
    this = live(task)
    model = network(this, **on).eval()
    found: list[Mapping[str, float]] = []
    other = supernet(on.get("space", make_space()), this, on.get("backbone"), seed=1).eval()
    with torch.no_grad():
        for batch in Batches(this, "train", 48, torch.device("cpu"), limit=48):
            this.meter().update(this.forward(other, batch), batch)  # what another meter has seen is not its concern
    for size, n in ((48, 1), (24, 2), (16, 3), (6, 8)):
        meter = this.meter()
        batches = Batches(this, "valid", size, torch.device("cpu"))
        with torch.no_grad():
            for batch in islice(batches, n):
                meter.update(this.forward(model, batch), batch)
        found.append(meter.compute())
    assert found[0].keys() == this.metrics.keys()
    assert all(math.isfinite(number) for number in found[0].values()), found[0]
    if this.splits["valid"] >= 48:
        for name, number in found[0].items():
            alike = [math.isclose(number, other[name], rel_tol=1e-4, abs_tol=1e-6) for other in found]
            assert all(alike), f"{name} depends on the batches"


def says_what_it_is_as_plain_text_and_data(task: Task, **on: Any) -> None:
    """`fingerprint` and `preprocessing`, where it has them: text that is always the same, and plain data."""
    one, two = live(task), live(task)
    if hasattr(one, "fingerprint"):
        assert isinstance(one.fingerprint, str)  # type: ignore[attr-defined]
        assert one.fingerprint == two.fingerprint  # type: ignore[attr-defined]
    if hasattr(one, "preprocessing"):
        json.dumps(one.preprocessing)  # type: ignore[attr-defined]


task_checks = [
    *checks_of_any_component,
    knows_its_shapes_and_metrics_without_data,
    has_splits_of_the_sizes_that_it_says,
    keeps_its_splits_apart,
    cuts_the_same_splits_from_the_same_generator,
    augments_by_torchs_generator_and_never_test,
    has_data_sets_that_workers_can_read,
    takes_the_features_of_a_backbone,
    has_a_loss_to_train_by,
    its_loss_is_a_mean_over_samples,
    gives_logits_or_none,
    measures_what_its_metrics_say,
    says_what_it_is_as_plain_text_and_data,
]
"""What every task keeps to."""
