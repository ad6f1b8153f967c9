"""What was found, trained on from its weights in the supernet, beside plain torch with the same network's files."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from corenas import seeding
from corenas.cli import main
from corenas.plugins import load_catalogue

SPEC = """
algorithm = "bignas"
backbone = { type = "resnet", in_channels = 1 }
mutator = { type = "sandwich", paths = 3 }
searcher = "random"
evaluators = ["accuracy"]
task = { type = "classification", data = "digits" }
train = { epochs = 4, batch_size = 64 }
search = { trials = 3 }

[space]
stem = { width = [8, 16], kernel = 3, pool = false }
stages = [
    { basic = { width = [8, 16], depth = [1, 2], ratio = 1 } },
    { basic = { width = [16, 24], ratio = 1 }, stride = 2 },
]
"""
AGAIN = """
[supernet]
from = "a"

[retrain]
begin = "supernet"

[retrain.train]
epochs = 6
batch_size = {images}
schedule = "constant"
optimizer = {{ type = "SGD", lr = 0.02, momentum = 0.9, weight_decay = 0.0 }}
"""


def network_of(folder):
    """The network of a folder, by its own file, without corenas."""
    spec = importlib.util.spec_from_file_location("network_of_a_run", folder / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.Network()
    network.load_state_dict(load_file(folder / "network.safetensors"))
    return network


@pytest.mark.slow
def test_fine_tuning_ends_with_the_weights_of_plain_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = load_catalogue().options("tasks", {"type": "classification", "data": "digits"})
    images, labels = task.start(seeding.generator(0, "task")).dataset("train", False).tensors()
    (tmp_path / "a.toml").write_text(SPEC)
    (tmp_path / "b.toml").write_text(AGAIN.format(images=len(images)))  # all in one batch, whose order is no matter
    for command in (["run", "a.toml", "--out", "a"], ["run", "b.toml", "--out", "b"]):
        assert main(command) == 0
    assert main(["export", "a", "--arch", "b/best/arch.toml", "--to", "c"]) == 0
    plain, ours = network_of(tmp_path / "c").train(), network_of(tmp_path / "b/best").eval()
    began = {name: tensor.clone() for name, tensor in plain.named_parameters()}
    optimizer = torch.optim.SGD(plain.parameters(), 0.02, 0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    theirs = dict(plain.named_parameters())
    for name, tensor in ours.named_parameters():
        moved = (theirs[name] - began[name]).norm()
        assert (tensor - theirs[name]).norm() < 1e-2 * moved, name
