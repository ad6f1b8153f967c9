"""What every backbone promises: `@pytest.mark.parametrize("check", backbone_checks)` in a plugin's tests.

Each check takes the options of a backbone, a space for it, and by keyword the shape of an image (channels, height,
width) if it is not (3, 32, 32): `check(MyBackbone(), SearchSpace.from_table(TABLE), image=(1, 28, 28))`.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import tomli
import tomli_w
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from corenas.calibrate import Evaluation
from corenas.contracts import Backbone
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply, keys_used
from corenas.options import structure
from corenas.settings import Calibration
from corenas.space import Arch, SearchSpace
from corenas.supernet import build_supernet
from corenas.testing.components import checks_of_any_component, global_generators_untouched
from corenas.testing.small import same, some_archs
from corenas.variables import Categorical

Shape = tuple[int, int, int]
IMAGE: Shape = (3, 32, 32)


class AllFeatures(nn.Module):
    """A head that gives the features as they are."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features -> the same."""
        return [*features]


class _Headless:
    """A task as far as a supernet is concerned."""

    def head(self, feat_dims: object) -> nn.Module:
        return AllFeatures()


def network(backbone: Backbone, space: SearchSpace, seed: int = 0) -> Any:
    """The supernet of a space, the same for the same seed; its outputs are its features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_supernet(backbone, space, _Headless())  # type: ignore[arg-type]
    model.head = AllFeatures()  # some have a head of their own
    return model


def used_network(backbone: Backbone, space: SearchSpace, image: Shape) -> Any:
    """The same in evaluation mode, after a few forwards in training, so that its statistics are not all alike."""
    model = network(backbone, space).train()
    with torch.no_grad():
        for arch in some_archs(space, 3):
            with apply(model, arch):
                model(noise(image, n=4))
    return model.eval()


def noise(image: Shape, n: int = 2) -> Tensor:
    """Images, always the same."""
    return torch.randn((n, *image), generator=torch.Generator().manual_seed(0))


def counted(plain: nn.Module, image: Shape) -> dict[str, int]:
    """flops and params of a plain network: the one counted by torch, the other by adding up."""
    params = sum(p.numel() for p in plain.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(plain).to("meta").eval()(torch.empty((1, *image), device="meta"))
    assert counter.get_total_flops() % 2 == 0  # torch counts a multiply-add twice
    return {"flops": counter.get_total_flops() // 2, "params": params}


def cost_of(model: nn.Module, space: SearchSpace, image: Shape, archs: Sequence[Arch]) -> list[dict[str, int]]:
    """flops and params of archs, by the core."""
    return [
        {name: cost[name] for name in ("flops", "params")}
        for cost in Cost(model, space, torch.empty(1, *image)).of(archs)
    ]


def states_the_layout_of_its_spaces(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """`layout`, if it has one, is an attrs class by which `corenas check` reads a space without torch."""
    layout = getattr(type(backbone), "layout", None)
    if layout is None:
        return
    assert isinstance(layout, type) and attrs.has(layout), f"layout {layout!r} is no attrs class"  # noqa: PT018
    structure(space.tree, layout)


def gives_the_features_that_it_states(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """`features`, and a mere call, give as many tensors as `feat_dims` has, each of so many channels; all finite.

    In evaluation mode those of an image hang on no other of its batch.
    """
    model = used_network(backbone, space, image)
    dims = model.backbone.feat_dims
    for arch in some_archs(space, 6):
        with torch.no_grad(), apply(model, arch):
            features = model.backbone.features(images := noise(image))
        assert same(images, noise(image)), "changes the images that it is given"
        assert [(len(f), f.shape[1]) for f in features] == [(2, sum(dim(arch))) for dim in dims], arch
        assert all(f.isfinite().all() for f in features), arch
    with torch.no_grad():
        called, features = model.backbone(noise(image)), model.backbone.features(noise(image))
        alone = model.backbone.features(noise(image)[1:])
    assert all(map(torch.equal, called, features)), "`forward` gives something else than `features`"
    text = "the features of an image hang on the others of its batch"
    for one, both in zip(alone, features, strict=True):
        torch.testing.assert_close(one, both[1:], rtol=1e-2, atol=1e-3 * float(both.abs().max()), msg=text)


def begins_with_its_largest_arch(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """Before any arch is put in force it computes what it does under the largest."""
    model = network(backbone, space).eval()
    with torch.no_grad():
        first = model(noise(image))
        apply(model, space.largest())
        assert same(first, model(noise(image)))


def uses_the_variables_of_its_space_and_no_others(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """Every variable is one that some layer looks at (`build_supernet` sees to it), and the other way round."""
    assert keys_used(network(backbone, space)) <= {*space.keys}


def answers_a_foreign_space_with_a_user_error(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """A space of other tables is a mistake of the user's, not an accident."""
    foreign = SearchSpace([Categorical("surely.no.such.table", (1, 2))])
    try:
        network(backbone, foreign)
    except UserError:
        return
    raise AssertionError("takes a space that is none for it")


def exports_random_archs(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """A subnet becomes a network of torch alone that computes the same: in double precision to 1e-10, in both modes."""
    model = used_network(backbone, space, image)
    for arch in some_archs(space, 5, seed=1):
        export_subnet(model, arch, torch.zeros(1, *image))  # compares their outputs
    x = noise(image, n=4).double()
    for arch, training in zip(some_archs(space, 4, seed=8), (True, False, True, False), strict=True):
        model.double().train(training)
        plain = export_subnet(model, arch, x[:1])
        with torch.no_grad(), apply(model, arch), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            ours = model(x)
            torch.default_generator.manual_seed(0)
            theirs = plain(x)
        for one, two in zip(ours, theirs, strict=True):
            assert (one - two).abs().max() <= 1e-10 * two.abs().max(), f"training {training}: {arch}"


def costs_what_its_exported_networks_cost(
    backbone: Backbone, space: SearchSpace, image: Shape = IMAGE, n: int = 5
) -> None:
    """flops are those that torch counts, params those that are there.

    n: how many archs are looked at
    """
    model, archs = network(backbone, space).eval(), some_archs(space, n, seed=2)
    plain = [counted(export_subnet(model, arch, torch.zeros(1, *image)), image) for arch in archs]
    assert cost_of(model, space, image, archs) == plain


def trains_exactly_what_an_arch_uses(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """Gradients are those of the exported network: as many elements of as many parameters have one, and no others.

    In double precision, with batch norms as they are built. A bias that a batch norm takes away again has none, up to
    rounding.
    """
    model, x = network(backbone, space).double().train(), noise(image, 4).double()
    for arch in some_archs(space, 4, seed=3):
        plain = export_subnet(model, arch, x[:1])
        summaries = []
        for net in (model, plain):
            net.zero_grad()
            with apply(model, arch), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                outputs = net(x)
                sum(o.mul(torch.linspace(0.5, 1.5, o.numel()).view_as(o)).sum() for o in outputs).backward()  # type: ignore[union-attr]
            grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            largest = max(float(grad.abs().max()) for grad in grads.values())
            felt = {name: grad.abs() > 1e-12 * largest for name, grad in grads.items()}
            summaries.append((sorted(int(mask.sum()) for mask in felt.values() if mask.any()), largest))
            silent = [name for name, mask in felt.items() if not mask.any() and not name.endswith("bias")]
            assert not silent, f"no gradient reaches {', '.join(silent)} under {arch}"
        counts, largest_of_both = zip(*summaries, strict=True)
        assert counts[0] == counts[1], f"other elements have gradients than in the exported network: {arch}"
        text = "gradients differ from the exported network's, {:.4g} and {:.4g} at the most".format(*largest_of_both)
        assert abs(largest_of_both[0] - largest_of_both[1]) <= 1e-9 * largest_of_both[1], f"{text}: {arch}"


def has_no_weight_that_no_arch_uses(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """Random archs, sixty at the most, use all parameters."""
    model, rng = network(backbone, space).train(), np.random.default_rng(4)
    missing = dict(model.named_parameters())
    for arch in [*some_archs(space, 2), *space.decode(space.draw(rng, 60))]:
        with apply(model, arch):
            sum(feature.square().sum() for feature in model(noise(image, 2))).backward()  # type: ignore[union-attr]
        missing = {name: p for name, p in missing.items() if p.grad is None}
        if not missing:
            return
    raise AssertionError(f"no arch uses {', '.join(missing)}")


def keeps_its_space_through_toml(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """Written as TOML and read again the space is the same, and so is the network."""
    again = SearchSpace.from_table(tomli.loads(tomli_w.dumps(space.to_table())))
    assert again.variables == space.variables
    assert again.to_table() == space.to_table()
    assert same(network(backbone, again).state_dict(), network(backbone, space).state_dict())


def draws_its_weights_from_torchs_generator(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """The same seed gives the same weights, and no other global generator is touched."""
    with global_generators_untouched():
        first, second = network(backbone, space, seed=1), network(backbone, space, seed=1)
    assert same(first.state_dict(), second.state_dict())


def goes_through_state_dict_deepcopy_and_pickle(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """A copy computes the same and shares nothing with the first."""
    model, arch, x = used_network(backbone, space, image), some_archs(space, 3, seed=5)[-1], noise(image)
    loaded = network(backbone, space, seed=1)
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad(), apply(model, arch):
        expected = model(x)
    for other in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), apply(other, arch):
            assert same(other(x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def builds_on_the_meta_device_and_costs_the_same_there(
    backbone: Backbone, space: SearchSpace, image: Shape = IMAGE
) -> None:
    """Costs need no weights: a supernet of any size can be looked at."""
    archs = some_archs(space, 4)
    real = cost_of(network(backbone, space), space, image, archs)
    with torch.device("meta"):
        model = build_supernet(backbone, space, _Headless())  # type: ignore[arg-type]
    assert {p.device.type for p in model.parameters()} <= {"meta"}, "allocates weights elsewhere"
    assert cost_of(model, space, image, archs) == real


def builds_one_subnet_alone(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """A space of one arch builds that network and no more: it is how an arch is trained from scratch."""
    archs = some_archs(space, 3, seed=6)
    for arch, cost in zip(archs, cost_of(network(backbone, space), space, image, archs), strict=True):
        model = network(backbone, space.fix(arch))
        assert sum(p.numel() for p in model.parameters()) == cost["params"], arch


def more_of_a_variable_never_costs_less(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """A larger width, depth, kernel, … has no fewer flops or params, all else being equal."""
    codes = [space.encode(some_archs(space, 6, seed=7))]
    columns = [(column, variable) for column, variable in enumerate(space.variables) if not variable.continuous]
    ordered = [(p, v) for p, v in columns if all(isinstance(choice, int | float) for choice in v.choices)]
    cost = Cost(network(backbone, space), space, torch.empty(1, *image))
    for column, variable in ordered:
        rising = sorted(range(len(variable.choices)), key=lambda i, v=variable: v.choices[i])  # type: ignore[misc]
        costs = []
        for code in rising:
            changed = codes[0].copy()
            changed[:, column] = code
            costs.append(cost(space.canonical(changed)))
        for less, more in itertools.pairwise(costs):
            for metric in ("flops", "params"):
                assert (less[metric] <= more[metric]).all(), f"more {variable.key} has less {metric}"


def runs_its_segments_in_order(backbone: Backbone, space: SearchSpace, image: Shape = IMAGE) -> None:
    """`segments`, if it has them, are parts of it that run one after the other, once each, under every arch."""
    model = used_network(backbone, space, image)
    segments = [*getattr(model.backbone, "segments", ())]
    assert {*segments} <= {*model.modules()}, "a segment is no part of the network"
    order: list[nn.Module] = []
    for segment in segments:
        segment.register_forward_hook(lambda module, args, output: order.append(module))
    for arch in some_archs(space, 3):
        order.clear()
        with torch.no_grad(), apply(model, arch):
            model(noise(image))
        assert order == segments, arch


class _Noise:
    """A task of some noise, as far as an evaluation is concerned. Its metrics tell apart what differs in one bit."""

    def __init__(self, image: Shape) -> None:
        self.images, self.splits = noise(image, n=6), {"train": 6, "valid": 6}
        self.example = self.images[:1]

    def dataset(self, split: str, augmented: bool) -> Any:
        return [(image,) for image in self.images]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def meter(self) -> Any:
        return _Bits()


class _Bits:
    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def update(self, outputs: Sequence[Tensor], batch: Any) -> None:
        self.seen += [output.contiguous().numpy().tobytes() for output in outputs]

    def compute(self) -> dict[str, float]:
        return {"bits": float(zlib.crc32(b"".join(self.seen)))}


def measures_archs_that_begin_alike_as_by_themselves(
    backbone: Backbone, space: SearchSpace, image: Shape = IMAGE
) -> None:
    """What `segments` gave for one arch serves for others that agree on them: no bit of an output is another one."""
    model, task = used_network(backbone, space, image), _Noise(image)
    rng, archs = np.random.default_rng(0), some_archs(space, 2)
    archs += [space.mutate(arch, 0.1, rng) for arch in archs]
    cpu, calibration = torch.device("cpu"), Calibration(batches=2, batch_size=3)
    together, alone = (Evaluation(model, task, calibration, cpu, batch_size=4, shared=n) for n in (1 << 30, 0))  # type: ignore[arg-type]
    assert [*map(together, archs)] == [*map(alone, archs)]


backbone_checks = [
    *checks_of_any_component,
    states_the_layout_of_its_spaces,
    gives_the_features_that_it_states,
    begins_with_its_largest_arch,
    uses_the_variables_of_its_space_and_no_others,
    answers_a_foreign_space_with_a_user_error,
    exports_random_archs,
    costs_what_its_exported_networks_cost,
    trains_exactly_what_an_arch_uses,
    has_no_weight_that_no_arch_uses,
    keeps_its_space_through_toml,
    draws_its_weights_from_torchs_generator,
    goes_through_state_dict_deepcopy_and_pickle,
    builds_on_the_meta_device_and_costs_the_same_there,
    builds_one_subnet_alone,
    more_of_a_variable_never_costs_less,
    runs_its_segments_in_order,
    measures_archs_that_begin_alike_as_by_themselves,
]
"""What every backbone keeps to. One with a variable of which more is cheaper (groups) leaves that check out."""
