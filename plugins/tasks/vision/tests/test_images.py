"""From files to what the model sees: decoding, preprocessing, the processes that load."""

import io
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from corenas.errors import UserError
from corenas.loading import Batches, Stream
from corenas.options import structure
from corenas_task_vision import Classification
from corenas_task_vision.data import Files
from corenas_task_vision.pictures import Decoding

RNG = np.random.default_rng(0)
RAW = {"mean": [0.0], "std": [1 / 255]}  # the items are then the pixels themselves


def start(seed=0, **table):
    return structure(table, Classification).start(np.random.default_rng(seed))


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def folder(root, classes=("cat", "dog"), n=6, size=(30, 40), suffix="png"):
    """Noise, losslessly unless it is JPEG; the table of `data`."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(noise(*size, 3)).save(root / name / f"{i}.{suffix}")
    return {"type": "folder", "root": str(root)}


def torchvisions(name, root):
    return {"type": "torchvision", "name": name, "root": str(root)}


def files(task):
    """Split -> the files of its images."""
    return {name: [*task.dataset(name, False).split.pool.paths[task.dataset(name, False).split.places]]
            for name in task.splits}  # fmt: skip


def by_hand(image, card):
    """What the card of a network says is to be done to an image (h, w, 3) or (h, w), with PIL and numpy."""
    side, (height, width) = card["crop"], image.shape[:2]
    if (height, width) != (side, side):
        scale = card["resize"] / min(height, width)
        height, width = (int(n * scale) if n != min(height, width) else card["resize"] for n in (height, width))
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        top, left = round((height - side) / 2), round((width - side) / 2)
        image = image[top : top + side, left : left + side]
    image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    mean, std = (np.array(card[key])[:, None, None] for key in ("mean", "std"))
    return (image / 255 - mean) / std


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_become_colour(tmp_path, mode):
    base = Image.fromarray(noise(9, 9, 3))
    picture = (base.convert("L") if mode == "LA" else base).convert(mode)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(path)
    image = Files([str(path)], Decoding(3, 9))[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 9, 9))
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(picture.convert("RGB")))
    assert Files([str(path)], Decoding(1, 9))[0].shape == (1, 9, 9)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_raises_no_warning(tmp_path):
    picture = Image.fromarray(noise(9, 9, 3)).convert("P")
    picture.save(tmp_path / "picture.png", transparency=bytes(range(200)))
    image = Files([str(tmp_path / "picture.png")], Decoding(3, 9))[0]
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(picture.convert("RGB")))


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    pixels = noise(9, 9, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    read = Files([str(tmp_path / "scan.png")], Decoding(3, 9))[0]
    assert read.shape == (3, 9, 9)
    torch.testing.assert_close(read[1], torch.from_numpy((pixels / 65535).astype(np.float32)))
    shades = (pixels >> 4).astype(np.uint16)  # 12 bits, as cameras give
    Image.fromarray(shades).save(tmp_path / "camera.png")
    read = Files([str(tmp_path / "camera.png")], Decoding(1, 9, bits=12))[0]
    torch.testing.assert_close(read[0], torch.from_numpy((shades / 4095).astype(np.float32)))


def test_pixels_of_32_bits_are_refused_by_the_name_of_the_file(tmp_path):
    path = str(tmp_path / "scan.tif")
    Image.fromarray(RNG.random((9, 9)).astype(np.float32)).save(path)
    with pytest.raises(UserError, match="32 bits") as caught:
        Files([path], Decoding(3, 9))[0]
    assert caught.value.faults[0].file == path


@pytest.mark.filterwarnings("ignore")  # PIL has much to say of such files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_damaged_file_is_an_image_or_the_users_mistake(tmp_path, kind):
    whole = io.BytesIO()
    Image.fromarray(noise(12, 12, 3)).save(whole, kind)
    path, rng = tmp_path / "damaged.img", np.random.default_rng(1)
    for i in range(100):
        data = bytearray(whole.getvalue())
        for place in rng.integers(0, min(len(data), 120), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if i % 3 == 0 else data)
        told = [str(path)]
        try:
            assert Files([str(path)], Decoding(3, 8))[0].dtype == torch.uint8
        except UserError as error:
            told = [fault.file for fault in error.faults]
        assert told == [str(path)]


def test_huge_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    smooth = np.linspace(0, 255, 800)[:, None, None] * np.ones((1, 800, 3))
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    small, full = (Files([str(tmp_path / "large.jpg")], Decoding(3, size))[0] for size in (32, 800))
    assert (small.shape, full.shape) == ((3, 100, 100), (3, 800, 800))
    assert (v2.functional.resize(full, [100]).float() - small.float()).abs().mean() < 2


# -- splits ------------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_in_one_split_each_and_move_by_the_rules(tmp_path):
    data = folder(tmp_path, ("cat", "déjà vu"), n=20)
    base, again, other = (start(seed, data=data, valid=8, test=0.3, size=8) for seed in (0, 0, 1))
    found = files(base)
    assert {name: len(paths) for name, paths in found.items()} == base.splits == {"train": 20, "valid": 8, "test": 12}
    assert len({path for paths in found.values() for path in paths}) == 40
    assert files(again) == found
    assert {*files(other)["test"]} != {*found["test"]}
    assert files(start(data=data, valid=0.5, test=0.3, size=8))["test"] == found["test"]
    for name in found:
        assert np.ptp(np.bincount(base.dataset(name, False).split.labels)) == 0


def test_ready_splits_stay_whole_and_what_is_cut_out_of_train_meets_none_of_them(tmp_path):
    for name in ("train", "test"):
        folder(tmp_path / name, n=10)
    task = start(data={"type": "folder", "root": str(tmp_path)}, valid=6, size=8)
    found = {name: {Path(str(p, "utf-8")).relative_to(tmp_path) for p in paths} for name, paths in files(task).items()}
    assert {path.parts[0] for path in found["test"]} == {"test"}
    assert {path.parts[0] for path in found["train"] | found["valid"]} == {"train"}
    assert (len(found["train"]), len(found["valid"]), len(found["test"])) == (14, 6, 20)
    assert not found["train"] & found["valid"]


# -- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "options"), [
    (40, 30, {"size": 16}),
    (30, 40, {"size": 16, "crop": 1.0}),
    (45, 64, {"size": 31, "crop": 0.9, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}),
    (20, 20, {"size": 20}),
])  # fmt: skip
def test_the_preprocessing_on_the_card_done_by_hand_gives_the_items(tmp_path, height, width, options):
    task = start(data=folder(tmp_path, size=(height, width)), **options)
    card = json.loads(json.dumps(task.preprocessing))
    assert card["classes"] == ["cat", "dog"]
    assert card["colours"] == "RGB"
    data = task.dataset("train", False)
    with Image.open(data.split.pool.paths[data.split.places[0]].decode()) as picture:
        expected = by_hand(np.asarray(picture), card)
    assert data[0][0].shape == task.example.shape[1:] == expected.shape
    step = 1.01 / 255 / min(card["std"]) if height != options["size"] else 1e-5  # resizing rounds to whole bytes
    assert np.abs(data[0][0].numpy() - expected).max() < step


@pytest.mark.parametrize("options", [{}, {"size": 16}, {"size": 5, "crop": 0.8, "mean": [0.5], "std": [0.2]}])
def test_the_card_holds_for_small_images_too(options):
    task = start(data="digits", **options)
    data = task.dataset("test", False)
    raw = data.split.pool[int(data.split.places[3])]
    card = task.preprocessing
    assert (card["crop"], card["colours"]) == (options.get("size", 8), "grey")
    assert np.abs(data[3][0].numpy() - by_hand(raw[0].numpy(), card)).max() < 1.01 / 255 / min(card["std"])


def test_small_images_are_resized_whole_as_torchvision_does():
    task = start(data="digits", size=20, **RAW)
    data = task.dataset("valid", False)
    expected = v2.Resize([20, 20], antialias=True)(data.split.pool[int(data.split.places[0])])
    torch.testing.assert_close(data[0][0], expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (33, 200)])
def test_photos_are_resized_and_cropped_as_torchvision_does(tmp_path, height, width):
    task = start(data=folder(tmp_path, n=5, size=(height, width)), size=28, **RAW)
    data = task.dataset("train", False)
    theirs = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])
    expected = theirs(data.split.pool[int(data.split.places[0])])
    torch.testing.assert_close(data[0][0], expected.float(), atol=1e-4, rtol=0)


# -- torchvision's formats ---------------------------------------------------------------------------------------------


def idx(path, array):
    """The file format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    for name, n in {"train": 60, "t10k": 20}.items():
        raw = tmp_path / "MNIST" / "raw"
        idx(raw / f"{name}-images-idx3-ubyte", noise(n, 28, 28))
        idx(raw / f"{name}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    return tmp_path


def test_another_share_for_validation_leaves_torchvisions_test_images_alone(mnist):
    tests = [start(data=torchvisions("MNIST", mnist), valid=n).dataset("test", False).tensors()[0] for n in (10, 0.5)]
    assert torch.equal(*tests)
    task = start(data=torchvisions("MNIST", mnist), test=59)  # not used: the data has its own
    assert task.splits == {"train": 54, "valid": 6, "test": 20}


@pytest.mark.parametrize("left", [0, 2, 10, 16, 400])
def test_a_file_that_is_cut_off_is_told(mnist, left):
    path = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="cannot read MNIST from") as caught:
        start(data=torchvisions("MNIST", mnist))
    assert caught.value.faults[0].dotted == "data.root"


def test_images_without_labels_are_told(mnist):
    idx(mnist / "MNIST" / "raw" / "train-images-idx3-ubyte", noise(50, 28, 28))
    with pytest.raises(UserError, match="50 images, but 60 labels"):
        start(data=torchvisions("MNIST", mnist))


def test_a_reader_that_fails_without_a_word_is_told_all_the_same(tmp_path, monkeypatch):
    def silent(*args, **options):
        raise EOFError

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", silent)
    with pytest.raises(UserError, match=r"cannot read CIFAR10 from .*: EOFError"):
        start(data=torchvisions("CIFAR10", tmp_path))


def test_dtd_has_three_splits_of_its_own(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split, n in {"train": 3, "val": 2, "test": 1}.items():
        names = [f"{kind}/{split}{i}.jpg" for kind in ("dotted", "lined") for i in range(n)]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names))
        for name in names:
            (base / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(20, 20, 3)).save(base / "images" / name)
    task = start(data=torchvisions("DTD", tmp_path), size=8)
    assert task.splits == {"train": 6, "valid": 4, "test": 2}
    assert task.dataset("test", False)[1][1] == 1


def test_eurosat_has_no_split_and_is_cut(tmp_path):
    folder(tmp_path / "eurosat" / "2750", [*"abcdefghij"], n=5, size=(64, 64))
    task = start(data=torchvisions("EuroSAT", tmp_path), test=10, valid=10)
    assert task.splits == {"train": 30, "valid": 10, "test": 10}
    assert len({int(p) for name in task.splits for p in task.dataset(name, False).split.places}) == 50
    assert task.example.shape == (1, 3, 64, 64)


def test_svhn_is_read_by_its_split_argument(tmp_path, monkeypatch):
    io_of_matlab = pytest.importorskip("scipy.io")
    pixels = {}
    for split, n in {"train": 40, "test": 20}.items():
        pixels[split] = noise(32, 32, 3, n)
        labels = np.arange(n)[:, None] % 10 + (np.arange(n)[:, None] % 10 == 0) * 10  # a zero is class 10 in the file
        io_of_matlab.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels[split], "y": labels})
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    task = start(data=torchvisions("SVHN", tmp_path), valid=10, **RAW)
    assert task.splits == {"train": 30, "valid": 10, "test": 20}
    images, labels = task.dataset("test", False).tensors()
    assert np.allclose(images, pixels["test"].transpose(3, 2, 0, 1), atol=1e-4)
    assert labels.tolist() == [*range(10)] * 2
    assert task.preprocessing["classes"] == [*map(str, range(10))]


# -- the processes that load -------------------------------------------------------------------------------------------


def same(first, second):
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_a_stream_gives_the_same_batches_whatever_the_number_of_workers(tmp_path):
    flips = ["RandomHorizontalFlip", {"type": "RandomResizedCrop", "size": 16}, "RandomErasing"]
    task = start(data=folder(tmp_path, n=12), size=16, augment=flips)

    def batches(epoch=0, seed=7, workers=0):
        return [batch for ((batch, _),) in Stream(task, "train", 4, seed, workers).epoch(epoch)]

    alone, helped = batches(), batches(workers=2)
    assert len(alone) == task.splits["train"] // 4
    assert same(alone, helped)
    assert not same(alone, batches(epoch=1))
    assert not same(alone, batches(seed=8))


@pytest.mark.parametrize("size", [8, 12])
def test_batches_of_images_in_memory_are_those_read_one_by_one(monkeypatch, size):
    task = start(data="digits", size=size)
    fast = Batches(task, "valid", 50, torch.device("cpu"))
    monkeypatch.setattr("corenas_task_vision.task.Images.tensors", lambda self: None)
    assert same(fast, Batches(task, "valid", 50, torch.device("cpu")))


def test_data_can_be_sent_to_a_process_that_starts_from_nothing(tmp_path):
    task = start(data=folder(tmp_path / "photos"), size=16, augment=["RandomHorizontalFlip"])
    sent = tmp_path / "data.pickle"
    sent.write_bytes(pickle.dumps([task.dataset("train", True), task.dataset("valid", False)]))
    script = "import pickle, sys, torch; augmented, plain = pickle.load(open(sys.argv[1], 'rb'));" \
             "torch.manual_seed(3); print(repr((augmented[0][0].sum().item(), plain[0][0].sum().item())))"  # fmt: skip
    told = subprocess.run([sys.executable, "-c", script, sent], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(3)
    here = (task.dataset("train", True)[0][0].sum().item(), task.dataset("valid", False)[0][0].sum().item())
    assert told.strip() == repr(here)
