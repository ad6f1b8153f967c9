"""How data reaches a model: the order, the augmentation and the batches that a seed decides."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from toys import Task

from corenas import seeding
from corenas.errors import UserError
from corenas.loading import Batches, Stream, to_device

CPU = torch.device("cpu")


def values(batch):
    return [tensor.tolist() for tensor in batch]


def wholes(stream, epoch=0):
    """The batches of an epoch that is cut into one part."""
    return [batch for ((batch, share),) in stream.epoch(epoch) if share == 1]


def test_an_epoch_shows_every_sample_once_and_leaves_the_rest_of_a_batch_out():
    stream = Stream(Task(train=50), "train", 12, seed=1)
    order = [stream.order(epoch) for epoch in range(3)]
    for epoch, found in enumerate(order):
        flat = [place for batch in found for place in batch]
        assert [len(batch) for batch in found] == [12] * 4
        assert len({i for _, i in flat}) == 48
        assert {e for e, _ in flat} == {epoch}
    assert len({str(found) for found in order}) == 3
    assert Stream(Task(train=5), "train", 12, seed=1).steps == 1


def test_order_and_augmentation_hang_on_seed_epoch_and_sample_alone():
    first = [values(batch) for batch in wholes(Stream(Task(), "train", 16, seed=1), 2)]
    torch.manual_seed(99)
    assert [values(batch) for batch in wholes(Stream(Task(), "train", 16, seed=1), 2)] == first
    assert [values(batch) for batch in wholes(Stream(Task(), "train", 16, seed=2), 2)] != first
    one, two = Stream(Task(), "train", 1, seed=1), Stream(Task(), "train", 96, seed=1)  # batches differ, samples do not
    singles = {i: next(iter(batch[0])) for ((_, i),), batch in zip(one.order(0), wholes(one), strict=True)}
    ((*whole,),) = two.order(0)
    for (_, i), image in zip(whole, wholes(two)[0][0], strict=True):
        assert torch.equal(image, singles[i])
    assert not torch.equal(singles[0], next(iter(Task().dataset("train", False)))[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_torchs_generator_as_it_was(workers):
    torch.manual_seed(3)
    wanted = torch.rand(5)
    torch.manual_seed(3)
    found = []
    for _ in zip(range(5), Stream(Task(), "train", 16, 0, workers).epoch(0), strict=False):
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), wanted)


def test_workers_change_nothing():
    alone = [values(batch) for batch in wholes(Stream(Task(), "train", 16, 0), 1)]
    assert [values(batch) for batch in wholes(Stream(Task(), "train", 16, 0, workers=2), 1)] == alone


def test_parts_of_a_batch_are_the_batch_with_shares_that_add_up():
    whole = wholes(Stream(Task(), "train", 16, 0))
    for batch, parts in zip(whole, Stream(Task(), "train", 16, 0, parts=3).epoch(0), strict=True):
        assert [len(part[1]) for part, _ in parts] == [5, 5, 6]
        assert [share for _, share in parts] == [5 / 16, 5 / 16, 6 / 16]
        for i, tensor in enumerate(batch):
            assert torch.equal(torch.cat([part[i] for part, _ in parts]), tensor)
    with pytest.raises(UserError, match="16 images cannot be cut into 17 parts"):
        Stream(Task(), "train", 16, 0, parts=17)


class Ragged(Task):
    """Samples of different sizes, which make batches in a way of their own."""

    def dataset(self, split, augmented):
        data = [(torch.full((i % 3,), i), i) for i in range(12)]
        return type("Data", (list,), {"collate": staticmethod(lambda samples: [*zip(*samples, strict=True)])})(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_says_how_its_samples_become_a_batch(workers):
    for boxes, numbers in wholes(Stream(Ragged(), "train", 4, 0, workers)):
        assert [len(box) for box in boxes] == [i % 3 for i in numbers]


def test_a_stream_goes_on_for_ever_and_from_any_place():
    stream = Stream(Task(), "valid", 20, 0, augmented=False)
    whole = [values(batch) for _, batch in zip(range(7), stream.forever(), strict=False)]
    assert whole == [values(batch) for epoch in range(4) for batch in wholes(stream, epoch)][:7]
    for start in range(6):
        assert values(next(stream.forever(start))) == whole[start]


class Fast:
    """A data set that gives its tensors whole."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]

    def tensors(self):
        return self.dataset.images, self.dataset.labels


class FastTask(Task):
    def dataset(self, split, augmented):
        return Fast(super().dataset(split, augmented))


def test_batches_of_a_split_come_in_order_and_whole():
    images, labels = Task().data["valid"]
    for task in (Task(), FastTask()):
        found = Batches(task, "valid", 20, CPU)
        assert [len(batch[1]) for batch in found] == [20, 20, 8]
        assert torch.equal(torch.cat([batch[0] for batch in found]), images)
        assert torch.equal(torch.cat([batch[1] for batch in found]), labels)
        assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in found)


def test_limited_batches_are_shuffled_and_the_same_whichever_way_they_are_read():
    found = [Batches(task, "train", 16, CPU, seed=3, limit=64) for task in (Task(), FastTask())]
    assert [values(batch) for batch in found[0]] == [values(batch) for batch in found[1]]
    assert [len(batch[1]) for batch in found[0]] == [16] * 4
    flat = torch.cat([batch[0] for batch in found[0]]).flatten(1)
    assert len(np.unique(flat.numpy(), axis=0)) == 64
    assert [values(b) for b in Batches(Task(), "train", 16, CPU, seed=4, limit=64)] != [values(b) for b in found[0]]
    assert [len(batch[1]) for batch in Batches(Task(), "train", 50, CPU, limit=60)] == [50, 10]
    assert len(Batches(Task(), "train", 50, CPU, limit=450)) == 2


def test_augmented_batches_hang_on_the_seed_alone():
    first = [values(b) for b in Batches(Task(), "train", 16, CPU, True, seed=3, limit=32)]
    state = torch.get_rng_state()
    assert [values(b) for b in Batches(FastTask(), "train", 16, CPU, True, seed=3, limit=32)] == first
    assert torch.equal(torch.get_rng_state(), state)


Pair = namedtuple("Pair", "image label")


def test_all_tensors_of_a_batch_move_and_nothing_else():
    image = torch.zeros(2, 3, 4, 4)
    batch = {"pair": Pair(image, torch.ones(2)), "names": ["a", "b"], "both": [image, (1, None)]}
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].image.is_meta
    assert moved["pair"].image.is_contiguous(memory_format=torch.channels_last)
    assert moved["pair"].label.is_meta
    assert moved["names"] == ["a", "b"]
    assert moved["both"][1] == (1, None)


def test_named_generators_are_streams_of_their_own():
    first, second = seeding.generator(1, "a"), seeding.generator(1, "b")
    assert first.integers(1 << 60) != second.integers(1 << 60)
    assert seeding.number(1, "a", 2, 3) != seeding.number(1, "a", 3, 2) != seeding.number(1, "b", 3, 2)


def test_a_seed_for_a_while_is_gone_after_it_even_after_an_error():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with seeding.seeded(1, "x", 5):
        first = torch.rand(3)
    with pytest.raises(RuntimeError), seeding.seeded(1, "x", 5):  # noqa: PT012
        assert torch.equal(torch.rand(3), first)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


class Broken(Task):
    def dataset(self, split, augmented):
        good = super().dataset(split, augmented)

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return len(good)

            def __getitem__(self, i):
                if i == 7:
                    raise UserError("this picture cannot be read", file="cat.jpg", hint="remove it")
                return good[i]

        return Data()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_arrives_whole_from_a_worker_too(workers):
    reads = (
        lambda: [*Stream(Broken(), "train", 4, seed=0, workers=workers).epoch(0)],
        lambda: [*Batches(Broken(), "train", 4, CPU, workers=workers)],
    )
    for read in reads:
        with pytest.raises(UserError) as error:
            read()
        assert [(f.message, f.file, f.hint) for f in error.value.faults] == [
            ("this picture cannot be read", "cat.jpg", "remove it")
        ]
