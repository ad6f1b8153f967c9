"""Data as people have it: broken files, other files, deep and odd pictures, tables of labels, unequal classes."""

import csv
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import sklearn.metrics
import sklearn.utils.class_weight
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import v2

from corenas.contracts import DistillerContext, Signals, Surroundings
from corenas.errors import UserError
from corenas.loading import Stream
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.tasks import task_checks
from corenas_task_vision import Classification, Data, MultiLabel, Regression
from corenas_task_vision.pictures import Decoding, pixels
from corenas_task_vision.task import Accuracies


def start(cls=Classification, seed=0, read=True, **table):
    return structure(table, cls).start(np.random.default_rng(seed), read)


def wrong(cls=Classification, **table):
    with pytest.raises(UserError) as caught:
        start(cls, **table)
    return caught.value.faults


def folder(root, counts, size=(20, 30), kind="png", seed=0):
    rng = np.random.default_rng(seed)
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{kind}")
    return {"type": "folder", "root": str(root)}


@pytest.fixture
def broken(tmp_path):
    """A folder in which three images are broken, each in its own way; and their names."""
    data = folder(tmp_path / "data", {"cat": 12, "dog": 12}, kind="jpg")
    cut, empty, text = (tmp_path / "data" / name for name in ("dog/7.jpg", "cat/0.jpg", "cat/3.jpg"))
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    text.write_text("no picture")
    return data, [str(path) for path in (empty, text, cut)]


def test_all_broken_images_are_told_at_once_before_anything_else(broken):
    data, names = broken
    faults = wrong(data=data)
    assert [fault.file for fault in faults] == names
    assert all("cannot be read" in fault.message and "object at" not in fault.message for fault in faults)
    assert "skip_broken = true" in faults[0].hint
    assert [fault.file for fault in wrong(data=data, verify="headers")] == names[:2]  # a header may be whole
    assert start(data=data, verify="none").splits == {"train": 17, "valid": 2, "test": 5}


def test_who_waits_is_told_how_many_images_were_looked_at(tmp_path, capsys, monkeypatch):
    data = folder(tmp_path, {"cat": 6, "dog": 6})
    start(data=data)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("corenas_task_vision.pictures._PATIENCE", 0.0)
    start(data=data)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "images looked at: 11 of 12"
    assert len(lines) == 12


def test_broken_images_are_left_out_on_request_and_told(broken):
    data, names = broken
    task = start(data=data, skip_broken=True, test=4, valid=4)
    assert task.splits == {"train": 13, "valid": 4, "test": 4}
    (note,) = task.notes
    assert note == f"3 images cannot be read and are left out: {', '.join(names)}"
    for split in task.splits:
        dataset = task.dataset(split, False)
        assert len([dataset[i] for i in range(len(dataset))]) == task.splits[split]


def test_a_pipe_among_images_is_passed_over_and_a_picture_too_large_for_memory_is_a_broken_one(tmp_path):
    data = folder(tmp_path / "data", {"cat": 5, "dog": 5})
    os.mkfifo(tmp_path / "data" / "cat" / "pipe.png")
    (note,) = start(data=data).notes
    assert note.endswith("passed over: 1 no regular file")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    huge = tmp_path / "data" / "dog" / "huge.png"
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    (fault,) = wrong(data=data)
    assert fault.file == str(huge)
    assert fault.message.endswith("it has 30,000 x 30,000 pixels, more than `max_pixels` in [task], 178,956,970")
    assert [fault.file for fault in wrong(data=data, verify="headers")] == [str(huge)]
    assert sum(start(data=data, skip_broken=True).splits.values()) == 10
    os.mkfifo(tmp_path / "table.csv")
    (fault,) = wrong(data={"type": "csv", "file": str(tmp_path / "table.csv")})
    assert (fault.dotted, fault.message.rpartition(": ")[2]) == ("data.file", "this is no file")


def test_what_is_no_image_is_counted_aloud(tmp_path):
    data = folder(tmp_path, {"cat": 5, "dog": 5})
    for name in ("cat/notes.txt", "cat/more.txt", "dog/.hidden.png", "dog/Thumbs.db", "dog/film.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (note,) = start(data=data).notes
    assert note.endswith("passed over: 2 .txt, 1 .db, 1 .mp4, 1 hidden")
    assert note.startswith("5 files in")


@pytest.mark.parametrize("kind", ["gif", "jfif", "avif"])
def test_formats_that_pillow_reads_are_read(tmp_path, kind):
    data = folder(tmp_path, {"cat": 4, "dog": 4}, kind="png" if kind == "jfif" else kind)
    for path in tmp_path.glob("*/*.png"):
        Image.open(path).save(path.with_suffix(".jfif"), "JPEG")
        path.unlink()
    task = start(data=data, size=8)
    assert sum(task.splits.values()) == 8
    assert task.dataset("train", False)[0][0].shape == (3, 8, 8)


def test_an_image_that_is_in_two_ready_splits_is_found_by_its_content(tmp_path):
    for seed, (name, n) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        folder(tmp_path / name, {"cat": n, "dog": n}, seed=seed)
    data = {"type": "folder", "root": str(tmp_path)}
    clean = start(data=data)
    assert (clean.notes, clean.cut) == ([], "split as the data says; no image is in two splits, by content")
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "test/cat/again.png")
    task = start(data=data)
    assert task.cut == "split as the data says; 1 images are in two splits, by content"
    assert "train/cat/1.png" in task.notes[0]
    assert "nobody looked" in start(data=data, verify="headers").cut


def test_a_moved_folder_has_the_same_fingerprint_and_another_image_another(tmp_path):
    data = folder(tmp_path / "here", {"cat": 5, "dog": 5})
    before = start(data=data).fingerprint
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = {"type": "folder", "root": str(tmp_path / "there")}
    assert start(data=moved).fingerprint == before
    (tmp_path / "there/cat/0.png").rename(tmp_path / "there/cat/zero.png")
    assert start(data=moved).fingerprint != before


# -- pictures that are not 8 bits, three channels and square ----------------------------------------------------------


def deep(root, most, dtype=np.uint16):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, most + 1, (8, 8), dtype=dtype)).save(root / name / f"{i}.png")
    return {"type": "folder", "root": str(root)}


def test_pictures_of_12_bits_in_16_keep_their_shades_and_are_told_of(tmp_path):
    data = deep(tmp_path, 4095)
    task = start(data=data, mean=[0.0], std=[1.0])
    assert task.example.shape == (1, 1, 8, 8)  # grey and small, as the files are
    (note,) = task.notes
    assert "`bits = 12`" in note
    fitting = start(data=data, mean=[0.0], std=[1.0], bits=12)
    assert fitting.notes == []
    assert fitting.preprocessing["bits"] == 12
    split = fitting.dataset("train", False)
    for i in range(len(split)):
        raw = np.asarray(Image.open(split.split.pool.path(int(split.split.places[i]))))
        torch.testing.assert_close(split[i][0][0], torch.from_numpy((raw / 4095).astype(np.float32)))
    assert len(torch.cat([split[i][0] for i in range(len(split))]).unique()) > 200  # 16 where 8 bits are kept
    assert start(data=deep(tmp_path / "whole", 65535)).notes == []


def write_png(path, array):
    """A PNG of 16 bits a channel by the letter of its specification: Pillow writes none."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_ppm(path, array):
    path.write_bytes(b"P6\n%d %d\n65535\n" % array.shape[1::-1] + array.astype(">u2").tobytes())


def write_tiff(path, array):
    tifffile.imwrite(path, array, photometric="rgb", compression="zlib")


def write_lzw(path, array):
    """A TIFF that tifffile does not write by itself: LZW of codes of 9 bits, and a clear code for each 200."""
    content = array.astype("<u2").tobytes()
    codes = [code for at in range(0, len(content), 200) for code in (256, *content[at : at + 200])]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    strip = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    height, width, _ = array.shape
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 5), (262, 3, 1, 2), (273, 4, 1, 14),
            (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(strip))]  # fmt: skip
    head = struct.pack("<2sHI3H", b"II", 42, 14 + len(strip), 16, 16, 16)
    entries = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + strip + entries + bytes(4))


@pytest.mark.parametrize(("kind", "write", "bands"), [
    ("png", write_png, 3), ("png", write_png, 4), ("png", write_png, 2), ("tif", write_tiff, 3), ("tif", write_lzw, 3),
    ("ppm", write_ppm, 3),
])  # fmt: skip
def test_colours_of_16_bits_keep_their_range(tmp_path, kind, write, bands):
    rng, arrays = np.random.default_rng(0), {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            array = rng.integers(0, 4096, (8, 9, bands), dtype=np.uint16)
            write(tmp_path / name / f"{i}.{kind}", array)
            arrays[str(tmp_path / name / f"{i}.{kind}")] = array.transpose(2, 0, 1)
    data = {"type": "folder", "root": str(tmp_path)}
    assert "`bits = 12`" in start(data=data).notes[0]
    for channels, weights in ((3, np.eye(3)), (1, [[0.299, 0.587, 0.114]])):  # those of ITU-R 601, as Pillow has them
        split = start(data=data, channels=channels, bits=12, mean=[0.0], std=[1.0]).dataset("train", False)
        for i in range(len(split)):
            array = arrays[split.split.pool.path(int(split.split.places[i]))] / 4095
            colours = array[:3] if bands > 2 else array[:1].repeat(3, 0)
            expected = np.einsum("kc,chw->khw", weights, colours)
            torch.testing.assert_close(split[i][0], torch.from_numpy(expected.astype(np.float32)), atol=1e-6, rtol=1e-6)


def test_a_huge_jpeg_is_read_small_and_counts_as_it_is_read(tmp_path):
    data = folder(tmp_path, {"a": 3, "b": 3})
    Image.new("RGB", (2400, 1600), (200, 100, 50)).save(tmp_path / "a/huge.jpg")
    task = start(data=data, size=32, max_pixels=300 * 200, mean=[0.0], std=[1.0])
    assert sum(task.splits.values()) == 7
    pool = task.dataset("train", False).split.pool
    assert pixels(str(tmp_path / "a/huge.jpg"), "huge.jpg", Decoding(3, 32, most=300 * 200)).shape == (3, 200, 300)
    assert pool.how.most == 300 * 200
    (fault,) = wrong(data=data, size=32, max_pixels=300 * 200 - 1)
    assert "2,400 x 1,600 pixels, more than `max_pixels` in [task], 59,999" in fault.message


def test_the_bands_of_a_tiff_are_its_channels_where_the_spec_says_nothing(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            bands = np.random.default_rng(i).integers(0, 256, (6, 12, 16), dtype=np.uint8)
            tifffile.imwrite(tmp_path / name / f"{i}.tif", bands, photometric="minisblack", planarconfig="separate")
    task = start(data={"type": "folder", "root": str(tmp_path)})
    assert task.example.shape == task.dataset("train", False)[0][0][None].shape == (1, 6, 12, 16)


@pytest.mark.parametrize("kind", ["npy", "tif", "pages"])
def test_images_of_many_channels_are_read_as_they_are(tmp_path, kind):
    rng, arrays = np.random.default_rng(0), {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            array = rng.integers(0, 256, (5, 12, 16), dtype=np.uint8)
            path = tmp_path / name / f"{i}.{'npy' if kind == 'npy' else 'tif'}"
            if kind == "npy":
                np.save(path, array.transpose(1, 2, 0))
            else:
                more = {"photometric": "minisblack", "planarconfig": "separate"} if kind == "tif" else {}
                tifffile.imwrite(path, array, **more)
            arrays[str(path)] = array
    task = start(data={"type": "folder", "root": str(tmp_path)}, channels=5, size=[12, 16], mean=[0.0], std=[1.0])
    split = task.dataset("train", False)
    assert task.example.shape == (1, 5, 12, 16)
    for i in range(len(split)):
        expected = arrays[split.split.pool.path(int(split.split.places[i]))] / 255
        torch.testing.assert_close(split[i][0], torch.from_numpy(expected.astype(np.float32)))
    faults = wrong(data={"type": "folder", "root": str(tmp_path)}, channels=4, size=8)
    assert len(faults) == 10
    assert "expected 4 channels first or last" in faults[0].message


@pytest.mark.parametrize(("image", "resized"), [((30, 20), (96, 64)), ((20, 60), (85, 255)), ((128, 96), (85, 64))])
def test_sizes_need_not_be_square(tmp_path, image, resized):
    data = folder(tmp_path, {"a": 4, "b": 4}, size=image)
    task = start(data=data, size=[64, 48], crop=0.75, mean=[0.0], std=[1.0])
    assert task.example.shape == (1, 3, 64, 48)
    split = task.dataset("train", False)
    pixels = split.split.pool[int(split.split.places[0])]
    whole = (max(85, resized[0]), max(64, resized[1]))
    expected = v2.functional.center_crop(v2.functional.resize(pixels, [*whole], antialias=True), [64, 48])
    assert split[0][0].shape == (3, 64, 48)
    torch.testing.assert_close(split[0][0], expected / 255, atol=2 / 255, rtol=0)
    assert (task.preprocessing["crop"], task.preprocessing["resize"]) == ([64, 48], [85, 64])


def test_channels_and_size_are_those_of_the_images(tmp_path):
    data = folder(tmp_path / "photos", {"a": 4, "b": 4}, size=(40, 30))
    assert start(data=data).example.shape == start(data=data, read=False).example.shape == (1, 3, 40, 30)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "photos/a/other.png")
    assert start(data=data).example.shape == (1, 3, 224, 224)
    for path in (tmp_path / "photos").glob("*/*.png"):
        Image.open(path).convert("L").save(path)
    assert start(data=data, size=16).example.shape == (1, 1, 16, 16)
    assert start(data=data, size=16, channels=3).example.shape == (1, 3, 16, 16)


# -- losses, mixtures, accuracies --------------------------------------------------------------------------------------


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes_and_the_focal_loss_are_those_written_by_hand(smoothing):
    scores, labels = numbers(0, 12, 10), torch.arange(12) % 10
    weights = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    more = {"data": "digits", "label_smoothing": smoothing, "read": False}
    logs, each = scores.log_softmax(1), torch.zeros(12, dtype=torch.float64)
    for i, label in enumerate(labels):
        each[i] = -(1 - smoothing) * weights[label] * logs[i, label] - smoothing / 10 * (weights * logs[i]).sum()
    weighted = start(class_weights=weights.tolist(), **more).loss(scores, (None, labels))
    torch.testing.assert_close(weighted, each.sum() / weights[labels].sum())
    sure = scores.softmax(1)[range(12), labels]
    focal = start(class_weights=weights.tolist(), focal=2.0, **more).loss(scores, (None, labels))
    torch.testing.assert_close(focal, ((1 - sure) ** 2 * each).sum() / weights[labels].sum())
    alike = F.one_hot(labels, 10).double()  # what a mixture is that has nothing of the other image
    for options, wanted in (({}, weighted), ({"focal": 2.0}, focal)):
        mixed = start(class_weights=weights.tolist(), **options, **more).loss(scores, (None, alike))
        torch.testing.assert_close(mixed, wanted)
    nearly = start(focal=1e-9, **more).loss(scores, (None, labels))
    torch.testing.assert_close(nearly, F.cross_entropy(scores, labels, label_smoothing=smoothing))


def test_balanced_weights_are_those_of_scikit_learn(tmp_path):
    task = start(data=folder(tmp_path, {"a": 20, "b": 6, "c": 12}), class_weights="balanced", test=5, valid=5)
    labels = task.dataset("train", False).split.labels
    expected = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert task.weights.tolist() == pytest.approx(expected)
    assert [fault.dotted for fault in wrong(data="digits", class_weights=[1.0, 2.0])] == ["class_weights"]


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_batches_are_mixed_by_seed_in_training_alone(options):
    task, plain = start(data="digits", **options), start(data="digits")
    both = [[batch for ((batch, _),) in Stream(t, "train", 32, 0).epoch(0)][:6] for t in (task, task, plain)]
    for (images, labels), (again, _), (unmixed, classes) in zip(*both, strict=True):
        assert torch.equal(images, again)
        assert labels.shape == (32, 10)
        torch.testing.assert_close(labels.sum(1), torch.ones(32))
        rolled, turned = unmixed.roll(1, 0), F.one_hot(classes, 10).float().roll(1, 0)
        share = (labels - turned)[labels != turned] / (F.one_hot(classes, 10) - turned)[labels != turned]
        assert share.std() < 1e-5 if len(share) > 1 else True
        mixed = share.mean() * unmixed + (1 - share.mean()) * rolled
        patched = ((images == unmixed) | (images == rolled)).all()
        assert torch.allclose(images, mixed, atol=1e-4) if len(options) == 1 and "mixup" in options else True
        assert patched if len(options) == 1 and "cutmix" in options else True
        assert float(task.loss(torch.zeros(32, 10), (images, labels))) == pytest.approx(np.log(10), rel=1e-5)
    assert task.dataset("train", False)[0][1] in range(10)
    assert not hasattr(task.dataset("test", True), "collate")


def test_balanced_accuracy_and_that_of_each_class_are_scikit_learns():
    task, rng = start(data="digits", per_class=True), np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 10)), rng.choice(10, 200, p=[0.55, *[0.05] * 9])
    scores[np.arange(200), labels] += 1
    meter = task.meter()
    for part in np.array_split(np.arange(200), 3):
        meter.update(torch.tensor(scores[part]), (None, torch.tensor(labels[part])))
    found, guesses = meter.compute(), scores.argmax(1)
    assert found.keys() == task.metrics.keys()
    assert [name for name, metric in task.metrics.items() if metric.share] == ["top1", "top5"]  # of all images
    assert found["balanced"] == pytest.approx(100 * sklearn.metrics.balanced_accuracy_score(labels, guesses))
    recalls = sklearn.metrics.recall_score(labels, guesses, average=None)
    assert [found[f"top1 of {name}"] for name in range(10)] == pytest.approx(100 * recalls)


def test_a_class_that_nearly_all_images_have_is_told_of(tmp_path):
    data = folder(tmp_path, {"good": 95, "bad": 5})
    (note,) = start(data=data, valid=20, test=20).notes
    assert note.startswith("95% of the validation images are 'good'")
    assert "per_class = true" in note


# -- tables of labels --------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A function that writes images and a table of them: columns -> cells; returns the table of `data`."""

    def write(n=20, **columns):
        rng = np.random.default_rng(0)
        (tmp_path / "images").mkdir(exist_ok=True)
        names = [f"images/{i}.png" for i in range(n)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / name)
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *columns])
            writer.writerows(zip(names, *columns.values(), strict=True))
        return {"type": "csv", "file": str(tmp_path / "labels.csv")}

    return write


def test_labels_of_a_table_are_classes(table):
    classes = ["pear", "fig"] * 10
    data = table(kind=classes, price=range(20))
    task = start(data={**data, "label": "kind"}, test=4, valid=4)
    assert task.preprocessing["classes"] == ["fig", "pear"]
    assert task.example.shape == (1, 1, 8, 8)
    for split in task.splits:
        part = task.dataset(split, False).split
        names = [classes[int(part.pool.path(int(place)).split("/")[-1][:-4])] for place in part.places]
        assert [["fig", "pear"][label] for label in part.labels] == names
    assert [fault.dotted for fault in wrong(data=data)] == ["data.label"]
    assert "did you mean 'kind'" in wrong(data={**data, "label": "knid"})[0].hint


def test_a_column_may_say_the_splits(table):
    parts = ["train"] * 12 + ["val"] * 3 + ["test"] * 5
    data = table(kind=["a", "b"] * 10, part=parts)
    task = start(data={**data, "split": "part"})
    assert task.splits == {"train": 12, "valid": 3, "test": 5}
    assert task.cut == "split as the data says; no image is in two splits, by content"
    parts = [name.upper() for name in ["Training"] * 12 + ["dev"] * 3 + ["testing"] * 5]
    assert start(data={**table(kind=["a", "b"] * 10, part=parts), "split": "part"}).splits == task.splits
    data = table(kind=["a", "b"] * 10, part=["all"] * 20)
    assert "found all" in wrong(data={**data, "split": "part"})[0].message


@pytest.mark.parametrize("several", [True, False])
def test_several_labels_are_learnt_and_measured_as_scikit_learn_does(table, several):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (20, 3))
    truth[:3] = np.eye(3)
    names = ("cat", "dog", "ox")
    if several:
        data = table(**{name: truth[:, k] for k, name in enumerate(names)})
    else:
        data = table(tags=["|".join(name for name, there in zip(names, row, strict=True) if there) for row in truth])
    task = start(MultiLabel, data=data, test=6, valid=4, positive_weight=2.0)
    assert task.preprocessing["labels"] == [*names]
    split = task.dataset("train", False)
    labels = torch.stack([split[i][1] for i in range(len(split))])
    places = [int(split.split.pool.path(int(place)).split("/")[-1][:-4]) for place in split.split.places]
    assert np.array_equal(labels.numpy(), truth[places])
    scores = numbers(0, 10, 3).float()
    probability = scores.sigmoid()
    by_hand = -(2 * labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    torch.testing.assert_close(task.loss(scores, (None, labels)), by_hand)
    meter = task.meter()
    for part in ([*range(6)], [*range(6, 10)]):
        meter.update(scores[part], (None, labels[part]))
    found = meter.compute()
    there, told = labels.numpy().astype(int), scores.numpy()
    assert found["map"] == pytest.approx(100 * sklearn.metrics.average_precision_score(there, told, average="macro"))
    assert found["f1"] == pytest.approx(100 * sklearn.metrics.f1_score(there, told > 0, average="micro"))
    assert found.keys() == task.metrics.keys()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_a_teacher_says_of_several_labels_is_learnt_label_by_label(temperature):
    task = start(MultiLabel, read=False, data="digits", labels=4)
    student, teacher = (torch.randn(6, 4, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    shown = [Signals(outputs, task.logits(outputs)) for outputs in (student, teacher)]
    probs = (teacher / temperature).sigmoid()
    binary = temperature**2 * F.binary_cross_entropy_with_logits(student / temperature, probs)
    own = temperature**2 * F.binary_cross_entropy(probs, probs)  # the teacher's entropy
    for name, wanted in (("soft_cross_entropy", binary), ("kl", binary - own)):
        options = load_catalogue().options("distillers", {"type": name, "temperature": temperature})
        live = options.start(DistillerContext(task, torch.nn.Identity(), torch.device("cpu")))
        torch.testing.assert_close(live.loss(*shown), wanted)


def test_numbers_are_learnt_normalised_and_measured_as_they_are(table):
    truth = np.random.default_rng(0).normal(50, 7, (20, 2)).round(3)
    data = table(height=truth[:, 0], weight=truth[:, 1])
    task = start(Regression, data=data, test=6, valid=4)
    split = task.dataset("train", False)
    places = [int(split.split.pool.path(int(place)).split("/")[-1][:-4]) for place in split.split.places]
    labels, given = torch.from_numpy(truth[places]), torch.stack([split[i][1] for i in range(10)])
    normal = (labels - labels.mean(0)) / labels.std(0, correction=0)
    outputs = numbers(0, 10, 2)
    torch.testing.assert_close(given, normal.float())
    torch.testing.assert_close(task.loss(outputs, (None, given)), F.mse_loss(outputs, normal))
    meter = task.meter()
    meter.update(outputs[:3], (None, given[:3]))
    meter.update(outputs[3:], (None, given[3:]))
    told = outputs * labels.std(0, correction=0) + labels.mean(0)
    found = meter.compute()
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(labels, told), rel=1e-5)
    assert found["rmse"] == pytest.approx(sklearn.metrics.mean_squared_error(labels.flatten(), told.flatten()) ** 0.5)
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(labels, told), rel=1e-4)
    card = task.preprocessing
    assert (card["targets"], card["target_mean"]) == (["height", "weight"], pytest.approx(labels.mean(0).tolist()))
    assert "expected numbers" in wrong(Regression, data=table(height=["tall"] * 20))[0].message


@pytest.mark.parametrize("check", task_checks)
@pytest.mark.parametrize(("cls", "count"), [(MultiLabel, {"labels": 2}), (Regression, {"targets": 2})])
def test_tasks_on_tables_conform(table, cls, count, check):
    columns = {"a": np.arange(20) % 2, "b": np.arange(20) // 3 % 2}
    check(cls(Data("csv", file=table(**columns)["file"]), size=8, channels=1, **count))


def test_what_is_no_table_of_labels_is_told(tmp_path, table):
    assert "cannot read" in wrong(data={"type": "csv", "file": str(tmp_path / "none.csv")})[0].message
    (tmp_path / "one.csv").write_text("file\n")
    assert "is no table of labels" in wrong(data={"type": "csv", "file": str(tmp_path / "one.csv")})[0].message
    data = table(kind=["a", "b"] * 10)
    (tmp_path / "images/3.png").unlink()
    assert "3.png" in wrong(data=data)[0].message
    assert [fault.dotted for fault in wrong(MultiLabel, data="digits")] == ["data"]


# -- odd files --------------------------------------------------------------------------------------------------------


def written(path, array, **options):
    """A file of an array: .npy, or a TIFF."""
    np.save(path, array) if path.suffix == ".npy" else tifffile.imwrite(path, array, **options)
    return pixels(str(path), str(path), Decoding(3, 8))


def test_planes_of_16_bits_and_whole_numbers_of_any_type_keep_their_range(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (3, 8, 9), dtype=np.uint16)
    wanted = torch.from_numpy((deep / 65535).astype(np.float32))
    for compression in (None, "zlib"):
        options = {"planarconfig": "separate", "photometric": "rgb", "compression": compression}
        torch.testing.assert_close(written(tmp_path / "planes.tif", deep, **options), wanted)
    for dtype in (">u2", np.int32, np.uint32, np.int64):
        torch.testing.assert_close(written(tmp_path / "a.npy", np.asfortranarray(deep.astype(dtype))), wanted)


@pytest.mark.parametrize(("array", "says"), [
    (np.full((3, 8, 9), -1, np.int16), "go from -1 to -1: expected 0 to 65,535"),
    (np.full((3, 8, 9), 1 << 20, np.int32), "expected 0 to 65,535"),
    (np.full((3, 8, 9), np.nan), "no finite numbers"),
    (np.zeros((3, 0, 9), np.uint8), "there are no pixels"),
    (np.zeros((3, 8, 9), np.complex64), "of complex64"),
    (np.zeros((8, 9), np.uint8), "expected 3 channels"),
])  # fmt: skip
def test_an_array_that_is_no_picture_is_a_broken_file_with_the_reason(tmp_path, array, says):
    for name in ("cat", "dog"):
        data = folder(tmp_path / "d", {name: 12})
    np.save(tmp_path / "d/cat/x.npy", array)
    (fault,) = wrong(data=data)
    assert (fault.file, says in fault.message) == (str(tmp_path / "d/cat/x.npy"), True), fault.message


def test_what_is_no_array_or_has_too_many_pixels_is_a_broken_file_and_is_not_read(tmp_path):
    data = folder(tmp_path / "d", {"cat": 12, "dog": 12})
    np.savez(tmp_path / "z.npz", np.zeros(3))
    os.rename(tmp_path / "z.npz", tmp_path / "d/cat/a.npy")
    shutil.copy(tmp_path / "d/cat/0.png", tmp_path / "d/cat/b.npy")
    with open(tmp_path / "d/cat/c.npy", "wb") as file:  # a header alone, of 3 TB
        header = {"descr": "|u1", "fortran_order": False, "shape": (3, 1000000, 1000000)}
        np.lib.format.write_array_header_1_0(file, header)
    found = wrong(data=data)
    assert [fault.file[-5:] for fault in found] == ["a.npy", "b.npy", "c.npy"]
    assert "more than `max_pixels`" in found[2].message
    for name in ("cat", "dog"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i in range(4):
            tifffile.imwrite(tmp_path / "t" / name / f"{i}.tif", np.zeros((5, 40, 40), np.uint8), compression="zlib")
    of_bands = {"data": {"type": "folder", "root": str(tmp_path / "t")}, "channels": 5}
    assert len(wrong(**of_bands, max_pixels=1500)) == 8
    start(**of_bands, max_pixels=1600)


def test_a_pixel_beyond_the_bits_that_are_in_use_is_told(tmp_path):
    for name, brightest in (("cat", 4095), ("dog", 4096)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 9), brightest, np.uint16)).save(tmp_path / name / f"{i}.png")
    data = {"type": "folder", "root": str(tmp_path)}
    found = wrong(data=data, bits=12)
    assert {os.path.basename(os.path.dirname(fault.file)) for fault in found} == {"dog"}
    assert "from 4,096 to 4,096: expected 0 to 4,095, with `bits` in [task]" in found[0].message
    start(data=data, bits=13)


def test_pages_turned_pictures_and_floats_of_another_scale_are_told_of(tmp_path):
    data, rng = folder(tmp_path, {"cat": 12, "dog": 12}), np.random.default_rng(0)
    assert start(data=data).notes == []
    frames = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / "cat" / name, save_all=True, append_images=frames[1:], lossless=True)
    tifffile.imwrite(
        tmp_path / "cat/a.tif", rng.integers(0, 256, (4, 20, 30), dtype=np.uint8), photometric="minisblack"
    )
    exif = Image.Exif()
    exif[0x112] = 6
    frames[0].save(tmp_path / "dog/a.jpg", exif=exif)
    np.save(tmp_path / "dog/a.npy", 255 * rng.random((20, 30, 3)).astype(np.float32))
    pages, turned, floats = start(data=data).notes
    assert pages.startswith("4 files have several pages or frames, of which the first is read")
    assert turned == "1 images say by EXIF that they are to be turned, which `upright = true` in [task] does"
    assert floats.startswith("pixels that are floats go from 0.")
    first = pixels(str(tmp_path / "cat/a.png"), "a.png", Decoding(3, 20))
    assert np.array_equal(first.numpy().transpose(1, 2, 0), np.asarray(frames[0]))


@pytest.mark.parametrize("lies", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_upright_turns_photos_as_pillow_does(tmp_path, lies, mode):
    """Deep pictures do not go through Pillow's own turning here."""
    rng, exif = np.random.default_rng(lies), Image.Exif()
    exif[0x112] = lies
    array = rng.integers(0, 65536, (6, 10), dtype=np.uint16) if mode == "I;16" else rng.integers(0, 256, (6, 10, 3))
    path = tmp_path / "a.png"
    Image.fromarray(array if mode == "I;16" else array.astype(np.uint8)).save(path, exif=exif)
    with Image.open(path) as picture:
        shown = np.array(ImageOps.exif_transpose(picture)).reshape(*((10, 6) if lies > 4 else (6, 10)), -1)
    wanted = torch.from_numpy(shown / np.float32(65535) if mode == "I;16" else shown).permute(2, 0, 1)
    how = Decoding(3 if mode == "RGB" else 1, 8, upright=True)
    torch.testing.assert_close(pixels(str(path), str(path), how), wanted)


def test_of_photos_that_are_turned_nothing_is_told_and_their_size_is_that_of_what_is_seen(tmp_path):
    data, exif = folder(tmp_path, {"cat": 12, "dog": 12}, size=(12, 20)), Image.Exif()
    assert start(data=data, upright=True).notes == ["task.upright = true does nothing: all images are upright"]
    exif[0x112] = 8
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as picture:
            picture.save(path, exif=exif)
    live, lying = start(data=data, upright=True), start(data=data)
    assert (live.notes, live.preprocessing["upright"], "upright" in lying.preprocessing) == ([], True, False)
    assert live.dataset("train", False)[0][0].shape[1:] == lying.dataset("train", False)[0][0].shape[:0:-1]
    (told,) = lying.notes
    assert told == "24 images say by EXIF that they are to be turned, which `upright = true` in [task] does"


# -- odd tables and folders -------------------------------------------------------------------------------------------

ROWS = [(f"p{i}.png", "cat" if i % 2 else "dog") for i in range(24)]
LINES = "\n".join(f"{name},{label}" for name, label in ROWS)


@pytest.fixture
def made(tmp_path):
    """A function from the text of a table of 24 images beside it to what `data` says."""
    for i, (name, _) in enumerate(ROWS):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(tmp_path / name)

    def write(text, encoding="utf-8"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        return {"type": "csv", "file": str(tmp_path / "t.csv")}

    return write


@pytest.mark.parametrize("text", [
    "file;label\n" + LINES.replace(",", ";"),
    "file\tlabel\n" + LINES.replace(",", "\t"),
    "\ufefffile, label\r\n" + LINES.replace(",", ", ").replace("\n", "\r\n\r\n"),
    '"file","label"\n' + "\n".join(f'"{name}","{label}"' for name, label in ROWS),
    "label,file\n" + "\n".join(f"{label},{name}" for name, label in ROWS),
    "file,label\n" + "\n".join(f".\\{name},{label}" for name, label in ROWS),
    "file,label\n" + "\n".join(f"{name[:-4]},{label}" for name, label in ROWS),
    "file,label\n" + "\n".join(f"./x/../{name},{label}" for name, label in ROWS),
], ids=["semicolons", "tabs", "spaces", "quotes", "columns", "windows", "suffix", "dots"])  # fmt: skip
def test_tables_as_people_write_them_say_the_same(made, text):
    task, usual = start(data=made(text)), start(data=made("file,label\n" + LINES))
    assert task.notes == []
    assert (task.names, task.fingerprint, task.example.shape) == (usual.names, usual.fingerprint, (1, 1, 8, 8))


@pytest.mark.parametrize(("text", "says"), [
    (LINES, "the first line of .* has an image, p0.png"),
    ("file,label\n" + LINES + "\np0.png,cat", "p0.png is in two rows that differ: label is 'dog' and 'cat'"),
    ("file,label\n" + LINES[:-3], "row 24 of the table has no label"),
    ("file,label,label\n" + LINES.replace("\n", ",x\n") + ",x", "two columns 'label'"),
    ("id,file,label\n" + "\n".join(f"{i},{n},{k}" for i, (n, k) in enumerate(ROWS)), "`label` is one of id, label"),
])  # fmt: skip
def test_tables_that_say_something_else_than_was_meant_are_refused(made, text, says):
    with pytest.raises(UserError, match=says):
        start(data=made(text))


def test_files_that_are_not_there_are_told_all_at_once_and_may_be_left_out(made):
    data = made("file,label\n" + LINES + "\na.png,cat\nb.png,dog")
    assert [fault.message[-5:] for fault in wrong(data=data)] == ["a.png", "b.png"]
    task = start(data=data, skip_broken=True)
    assert (sum(task.splits.values()), task.notes) == (
        24,
        ["2 files are not there, and their rows left out: a.png, b.png"],
    )
    many = made("file,label\n" + LINES + "".join(f"\nno{i}.png,cat" for i in range(70)))
    assert "and 20 more" in wrong(data=many)[-1].message


def test_a_file_that_has_several_rows_counts_once(made):
    task = start(data=made("file,label\n" + LINES + "\n" + LINES))
    assert sum(task.splits.values()) == 24
    assert task.notes == ["24 rows are of a file that another row is of, and count once"]


def test_yes_and_no_are_written_in_several_ways(made):
    def labels(cells):
        rows = "\n".join(f"{name},{cells[i % 2]},{cells[i // 2 % 2]}" for i, (name, _) in enumerate(ROWS))
        return start(MultiLabel, data=made("file,x,y\n" + rows)).dataset("train", False).split.labels.tolist()

    assert labels(("0", "1")) == labels(("False", "True")) == labels(("0.0", "1.0")) == labels(("false", "TRUE"))


def test_numbers_keep_what_they_differ_by_however_large_they_are(made):
    when = 1_700_000_000 + np.arange(24)
    task = start(
        Regression, data=made("file,t\n" + "\n".join(f"{n},{t}" for (n, _), t in zip(ROWS, when, strict=True)))
    )
    split = task.dataset("train", False).split
    places = [int(split.pool.path(int(place)).split("/")[-1][1:-4]) for place in split.places]
    truth = when[places]
    np.testing.assert_allclose(split.labels[:, 0], (truth - truth.mean()) / truth.std(), rtol=1e-5, atol=1e-6)
    meter = task.meter()
    meter.update(torch.from_numpy(split.labels + 1), (None, torch.from_numpy(split.labels)))
    assert meter.compute()["mae"] == pytest.approx(truth.std(), rel=1e-5)
    (note,) = start(Regression, data=made("file,t\n" + "\n".join(f"{name},3" for name, _ in ROWS))).notes
    assert note == "t is the same number for all images to train on"


@pytest.mark.parametrize(
    "names", [("Train", "VAL", "Test"), ("training", "validation", "testing"), ("train", "dev", "test")]
)
def test_ready_splits_may_be_called_otherwise(tmp_path, names):
    for split, n in zip(names, (5, 3, 2), strict=True):
        folder(tmp_path / split, {"cat": n, "dog": n}, seed=n)
    task = start(data={"type": "folder", "root": str(tmp_path)})
    assert (task.splits, task.names) == ({"train": 10, "valid": 6, "test": 4}, ["cat", "dog"])
    shutil.rmtree(tmp_path / names[2] / "dog")
    assert start(data={"type": "folder", "root": str(tmp_path)}).notes == ["no test image is of 'dog'"]


def test_of_many_classes_balanced_accuracy_is_measured_and_that_of_each_is_not():
    names, generator = [f"c{i}" for i in range(130)], torch.Generator().manual_seed(0)
    labels, logits = torch.randint(130, (400,), generator=generator), torch.randn(400, 130, generator=generator)
    logits[torch.arange(0, 400, 2), labels[::2]] += 5
    meter = Accuracies((1,), names)
    for part in (slice(0, 150), slice(150, 400)):
        meter.update(logits[part], (None, labels[part]))
    found = meter.compute()
    assert found.keys() == {"top1", "balanced"}
    there = np.unique(labels)
    wanted = sklearn.metrics.recall_score(labels, logits.argmax(1), average="macro", labels=there)
    assert found["balanced"] == pytest.approx(100 * wanted)


def test_options_of_the_head_are_told_to_do_nothing_where_a_network_has_its_own():
    class Own(torch.nn.Module):
        own_head = torch.nn.Identity()

    class Whole(torch.nn.Module):
        backbone = Own()

    task = structure({"data": "digits", "dropout": 0.5, "auxiliary": 0.4}, Classification)
    live = task.start(np.random.default_rng(0), False)
    there = task.idle(Surroundings(SearchSpace([]), live, Whole()))
    assert there["dropout"] == there["auxiliary"] == "this network has a head of its own"
    assert "dropout" not in task.idle(Surroundings(SearchSpace([]), live, torch.nn.Identity()))
    assert "auxiliary" not in structure({"data": "digits"}, MultiLabel).idle(
        Surroundings(SearchSpace([]), live, Whole())
    )
