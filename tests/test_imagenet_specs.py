"""The papers' whole recipes in spec/imagenet: they are right without the data, and train on a folder of photos."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corenas import seeding
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare, start_trainer
from corenas.run.spec import load_spec
from corenas.train import run_training

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "spec/imagenet").glob("*.toml"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder in ImageNet's layout, of eight small photos in two classes."""
    from torchvision.io import write_jpeg

    root, noise = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(8 if split == "train" else 2):
                photo = torch.randint(256, (3, 40, 48), generator=noise, dtype=torch.uint8)
                write_jpeg(photo, str(folder / f"{i}.jpg"))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_recipe_is_right_without_the_data(path):
    command = [sys.executable, "-m", "corenas", "check", "--no-data", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_recipe_trains_for_two_steps(path, photos):
    overrides = ["train.batch_size=2", "train.accumulate=1", "train.workers=0", 'train.precision="float32"']
    for task in ("task", "retrain.task"):
        if f"\n[{task}]\n" in path.read_text():
            data = f'{{ type = "folder", root = "{photos}", test = "val" }}'
            overrides += [f"{task}.data={data}", f"{task}.classes=2", f"{task}.valid=4"]
    spec, _ = load_spec(path, load_catalogue(), overrides)
    if "train" not in spec.algorithm.stages:
        pytest.skip("it trains no supernet; its plugin's tests train the network that it finds")
    prepared = prepare(spec)
    model = prepared.supernet
    with seeding.seeded(0, "test"):
        before = [p.detach().clone() for p in model.parameters()]
        run_training(start_trainer(prepared), model, prepared.task, spec.mutator, prepared.cost, limit=2)
    moved = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert moved > 20
    assert all(p.isfinite().all() for p in model.parameters())
