"""README's way from one's own pictures and published weights to a network, word for word."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from corenas.cli import main
from corenas_backbone_resnet.weights import torchvision_name

README = (Path(__file__).parents[4] / "README.md").read_text(encoding="utf-8")
SPEC = README.partition("**Your own pictures**")[2].partition("```toml\n")[2].partition("```")[0]


def test_own_pictures_and_published_weights_become_a_network_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(SPEC.splitlines()) <= 10
    Path("photos.toml").write_text(SPEC)
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = Path("photos", ("cat", "dog")[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)  # as photos, each of its own size
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    torch.manual_seed(0)
    published = torchvision.models.resnet18()
    torch.save(published.state_dict(), "resnet18.pth")

    small = ["--set", "task.size=32", "--set", "train.epochs=0", "--set", "search.trials=3"]
    small += ["--set", 'export.formats=["safetensors"]']
    assert main(["run", "photos.toml", *small]) == 0, capsys.readouterr().err
    assert Path("runs/photos/best/arch.toml").is_file()

    # Nothing on the way, the algorithm's own initialisation among it, has touched the published weights.
    assert main(["export", "runs/photos", "--arch", "max", "--to", "max", "--format", "safetensors"]) == 0
    found = {torchvision_name(key): tensor for key, tensor in load_file("max/network.safetensors").items()}
    weights = {key: parameter for key, parameter in published.named_parameters() if not key.startswith("fc.")}
    assert all(torch.equal(found[key], parameter) for key, parameter in weights.items())
