"""Every backbone that the catalogue lists learns on its example; every space that is there is one."""

import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import tomli
import torch
from torch import nn

from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.run.alone import inherit
from corenas.space import SearchSpace
from corenas.space_toml import MOST_BLOCKS
from corenas.supernet import Supernet
from corenas.testing.backbones import (
    cost_of,
    costs_what_its_exported_networks_cost,
    counted,
    exports_random_archs,
    gives_the_features_that_it_states,
    network,
    noise,
    used_network,
)

CATALOGUE = load_catalogue()
NAMES = CATALOGUE.names("backbones")
SPACES = sorted((Path(__file__).parent.parent / "spec" / "space").glob("*.toml"))
IMAGE = (1, 28, 28)


def example(name):
    """A backbone and its space, as its options class offers them to be tried."""
    cls = CATALOGUE.find("backbones", name).cls
    if not hasattr(cls, "example"):
        pytest.skip(f"{name} has no example to try it on")
    return structure(cls.example["backbone"], cls), SearchSpace.from_table(cls.example["space"])


def test_there_are_backbones():
    assert "mobilenetv3" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_keeps_its_promises_in_its_own_tests(name):
    tests = (Path(__file__).parent.parent / f"plugins/backbones/{name}/tests").glob("test_*.py")
    assert any('parametrize("check", backbone_checks)' in path.read_text() for path in tests)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_archs_cost_what_their_exported_networks_cost(name):
    costs_what_its_exported_networks_cost(*example(name), image=IMAGE, n=20)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_not_square_are_resized_and_cost_what_torch_counts(name):
    backbone, space = example(name)
    sides = {"height": 56, "width": 28} if name == "vit" else {"height": 40, "width": 24, "scale": [0.5, 0.75, 1]}
    space = SearchSpace.from_table({**type(backbone).example["space"], "resolution": sides})
    archs = [space.smallest(), space.largest()]
    model = network(backbone, space).eval()
    found = cost_of(model, space, (1, 30, 50), archs)
    for arch, cost in zip(archs, found, strict=True):
        plain = export_subnet(model, arch, torch.zeros(1, 1, 30, 50))
        assert counted(plain, (1, 30, 50)) == cost
    if name != "vit":
        assert (archs[0]["resolution.scale"], archs[1]["resolution.scale"]) == (0.5, 1)
        with torch.no_grad(), apply(model, archs[0]):
            assert model.backbone.resize(torch.zeros(1, 1, 30, 50)).shape == (1, 1, 20, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_goes_on_from_its_export(name):
    backbone, space = example(name)
    model, images = used_network(backbone, space, IMAGE).eval(), noise(IMAGE)
    for arch in (space.smallest(), space.sample(np.random.default_rng(0))):
        plain = export_subnet(model, arch, images[:1])
        alone = network(backbone, space.fix(arch), seed=1).eval()
        inherit(alone, plain.state_dict())
        with torch.no_grad(), apply(alone, arch):
            torch.testing.assert_close(alone(images), plain.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_space_that_learns(name):
    backbone, space = example(name)
    assert space.size > 1
    model = network(backbone, space).train()
    images = torch.randn(32, *IMAGE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 4
    with apply(model, space.largest()):
        head = nn.Linear(model(images)[-1].shape[1], 4)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
        losses = []
        for _ in range(12):
            features = model(images)[-1].unsqueeze(-1).flatten(2).mean(2)
            loss = nn.functional.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_features_are_maps_that_become_smaller(name):
    backbone, space = example(name)
    if not hasattr(backbone, "levels"):
        pytest.skip(f"{name} gives no levels")
    largest = space.largest()
    fixed = space.fix({key: largest[key] for key in space.keys if key.startswith(("head.", "stages.2."))})
    stages = len(space.tree["stages"]) if "stages" in space.tree else 2
    backbone = attrs.evolve(backbone, levels=(1, 2)[:stages])
    gives_the_features_that_it_states(backbone, fixed, image=IMAGE)
    exports_random_archs(backbone, fixed, image=IMAGE)
    sides = [level.shape[2] for level in network(backbone, fixed)(torch.zeros(1, *IMAGE))]
    assert sides == sorted(sides, reverse=True)
    assert sides[-1] > 1


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_every_space_builds_for_the_backbone_that_its_first_lines_name(file):
    text = file.read_text()
    found = re.search(r'backbone[\s#]+["`](\w+)', text.partition("\n\n")[0])
    assert found, "the comment at the top says for which backbone it is"
    space, cls = SearchSpace.from_table(tomli.loads(text)), CATALOGUE.find("backbones", found[1]).cls
    assert space.size >= 1
    structure(space.tree, cls.layout)
    with torch.device("meta"):
        body = cls().build(space)
    cost = Cost(Supernet(body, nn.Identity()), space, torch.empty(1, cls().in_channels or 3, 224, 224))
    low, high = cost.of([space.smallest(), space.largest()])
    assert all(0 < low[metric] <= high[metric] for metric in low)


def test_the_deepest_stage_that_a_space_may_have_has_a_cost():
    stage = {"width": [16, 24], "depth": {"type": "int", "low": 1, "high": MOST_BLOCKS}, "kernel": 3, "expand": 2}
    table = {"stem": {"width": 16}, "stages": [stage], "head": {"expand": 64, "width": 64}}
    space = SearchSpace.from_table(table)
    with torch.device("meta"):
        model = Supernet(CATALOGUE.find("backbones", "mobilenetv3").cls().build(space), nn.Identity())
    small, large = Cost(model, space, torch.empty(1, 3, 32, 32)).of([space.smallest(), space.largest()])
    own = sum(p.numel() for p in model.backbone.stages[0].blocks[1].parameters())
    assert large["params"] - small["params"] > (MOST_BLOCKS - 1) * own
    assert large["params"] == sum(p.numel() for p in model.parameters())
