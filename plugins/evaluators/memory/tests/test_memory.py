import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corenas.contracts import Evaluator
from corenas.export import export_subnet
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.backbones import network
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import context, evaluator_checks
from corenas.testing.small import make_space, some_archs
from corenas_evaluator_memory import Memory
from corenas_evaluator_memory.peak import peak_memory, weight_memory

IMAGE = (1, 28, 28)
CATALOGUE = load_catalogue()
EXAMPLES = [n for n in CATALOGUE.names("backbones") if hasattr(CATALOGUE.find("backbones", n).cls, "example")]


class Alive(TorchDispatchMode):
    """Counts real memory: each tensor that an operation gives adds its bytes until Python lets go of it."""

    def __init__(self, *before):
        super().__init__()
        self.now = self.most = 0
        self.known = set()
        for tensor in before:
            self.count(tensor)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, number, size):
        self.known.discard(number)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A logarithm for the backward pass, which the network does not hold, comes with attention.
        results = result[:1] if "scaled_dot_product" in str(func) else result
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


def counted(plain):
    weights = {t.untyped_storage()._cdata for t in (*plain.parameters(), *plain.buffers())}
    box = [torch.zeros(1, *IMAGE)]
    gc.collect()
    mode = Alive(*box)
    mode.known |= weights
    with torch.no_grad(), mode:
        type(plain).forward(plain, box.pop())  # the function's own reference is the only one
    return mode.most


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_peak_is_what_a_real_run_of_the_exported_network_holds(name):
    cls = CATALOGUE.find("backbones", name).cls
    backbone, space = structure(cls.example["backbone"], cls), SearchSpace.from_table(cls.example["space"])
    model = network(backbone, space).eval()
    for arch in [space.largest(), space.smallest(), space.sample(np.random.default_rng(0))]:
        plain = export_subnet(model, arch, torch.zeros(1, *IMAGE)).eval()
        assert peak_memory(plain, torch.zeros(1, *IMAGE)) == counted(plain)


class Wide(nn.Module):
    """Its peak is at the sum: two tensors of 4 channels and the one of 8 that is read after it."""

    def __init__(self):
        super().__init__()
        self.widen = nn.Conv2d(1, 8, 1)
        self.act = nn.ReLU(inplace=True)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        wide = self.act(self.widen(x))
        narrow = self.narrow(wide)
        return self.last(wide)[:, 0], self.twice(narrow) + narrow


def test_what_is_alive_is_what_a_later_operation_still_reads():
    plain = fx.symbolic_trace(Wide())
    channel = 4 * 6 * 6
    # `last` writes 1 while `wide` (8) and `narrow` (4) live; `twice` works beside `narrow` and the output of `last`.
    assert peak_memory(plain, torch.zeros(1, 1, 6, 6)) == 13 * channel
    assert peak_memory(plain, torch.zeros(3, 1, 6, 6)) == 3 * 13 * channel


def test_the_layers_of_a_sequence_are_operations_of_their_own():
    graph = fx.Graph()
    graph.output(graph.call_module("all", (graph.placeholder("x"),)))
    plain = fx.GraphModule({"all": nn.Sequential(nn.Conv2d(1, 9, 1), nn.Conv2d(9, 1, 1))}, graph)
    assert peak_memory(plain, torch.zeros(1, 1, 5, 5)) == 4 * 25 * 10


def test_archs_are_measured_as_their_exported_networks_and_cost_no_weights():
    where = context()
    archs = some_archs(make_space(), 4)
    for arch, metrics in zip(archs, Memory().start(where)(archs, 1.0), strict=True):
        plain = export_subnet(where.supernet, arch, where.task.example).eval()
        assert metrics["peak_memory"] == peak_memory(plain, where.task.example)
        weights = [t for t in plain.state_dict().values() if t.is_floating_point()]
        assert metrics["weight_memory"] == 4 * sum(map(torch.numel, weights)) == weight_memory(plain)
    (half,) = Memory(element=2).start(where)(archs[-1:], 1.0)
    assert {name: 2 * number for name, number in half.items()} == metrics


def test_a_network_that_was_never_trained_needs_the_same():
    archs = some_archs(make_space(), 3)
    assert Memory().start(context(trained=False))(archs, 1.0) == Memory().start(context())(archs, 1.0)


@pytest.mark.parametrize("check", evaluator_checks)
def test_conforms(check):
    check(Memory())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_evaluator_memory")


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    (options,) = (CATALOGUE.options("evaluators", item) for item in spec["evaluators"] if item != "accuracy")
    assert options == Memory(element=1)
    assert isinstance(options, Evaluator)
