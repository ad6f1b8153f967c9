"""What every searchable layer promises: `@pytest.mark.parametrize("check", mutable_checks)` in a plugin's tests.

Each check takes a function that makes the layer over variables of its own, and by keyword the shape of an input for an
arch, if it is not (2, active inputs, 6, 6) or, of a layer without `inputs`, as its keyword says:

    check(lambda: MyConv(Variable("i", (2, 4)), Variable("o", (3, 6)), kernel=3))
    check(lambda: MyLinear(Variable("i", (2, 4)), 5), shape=lambda arch: (2, arch["i"]))
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from corenas.calibrate import recalibrate
from corenas.export import export_subnet
from corenas.mutable import Mutable, Resizing, apply, largest_choice
from corenas.positions import costs_inputs
from corenas.testing.components import global_generators_untouched
from corenas.testing.small import condition, differing, same
from corenas.value import Constant, Dimension, Value

Make = Callable[[], nn.Module]
Choices = Mapping[str, Any]
Shape = Callable[[Choices], tuple[int, ...]] | None


def layer(make: Make, seed: int = 0) -> Any:
    """The layer with weights, and statistics if it has some, that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = make()
        for name, buffer in made.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return made.eval()


def archs_of(made: Any, n: int = 12) -> list[dict[str, Any]]:
    """The largest choices of all its variables, and some others spread over all combinations."""
    domains = {
        key: choices
        for value in made.elastic.values.values()
        for part in _parts(value)
        for key, choices in part.domains.items()
    }
    every = [*itertools.islice(itertools.product(*(sorted(choices) for choices in domains.values())), 100_000)]
    picked = sorted({*np.linspace(0, len(every) - 1, min(n, len(every))).astype(int).tolist()})
    return [dict(zip(domains, every[i], strict=True)) for i in picked][::-1]


def _parts(value: Value | Dimension) -> tuple[Value, ...]:
    return value.parts if isinstance(value, Dimension) else (value,)


def noise(made: Any, arch: Choices, shape: Shape = None) -> Tensor:
    """An input for an arch, always the same."""
    if shape is None:
        inputs = made.elastic.values.get("inputs") or made.elastic.values.get("outputs") or Constant(4)
        size = inputs(arch)
        size = (2, sum(size) if isinstance(size, tuple) else size, 6, 6)
    else:
        size = shape(arch)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@contextmanager
def _in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def states_its_values_and_begins_with_the_largest(make: Make, shape: Shape = None) -> None:
    """Its values say what its shape follows from; its choice has the same names and is, at first, the largest."""
    made = layer(make)
    text = "it is no mutable: it has no `elastic`; of what is built of mutables alone, these checks are for the parts"
    assert isinstance(made, Mutable), text
    assert all(isinstance(value, Value | Dimension) for value in made.elastic.values.values())
    assert dict(made.elastic.choice) == largest_choice(made.elastic.values)
    if isinstance(made, Resizing):
        assert {*made.resizes} <= {*made.elastic.values}


def takes_any_arch_for_a_while(make: Make, shape: Shape = None) -> None:
    """Under an arch it computes something finite of the size that `outputs` says; then all is as before.

    In evaluation mode what it makes of a sample hangs on no other of its batch. Its input is as before.
    """
    made = layer(make)
    before = condition(made)
    for arch in archs_of(made):
        x = noise(made, arch, shape)
        with torch.no_grad(), apply(made, arch):
            assert dict(made.elastic.choice) == {name: value(arch) for name, value in made.elastic.values.items()}
            out, alone = made(x), made(x[-1:])
        assert same(x, noise(made, arch, shape)), f"changes its input: {arch}"
        assert out.isfinite().all(), arch
        if len(out) == len(x):
            text = f"what it makes of a sample hangs on the others: {arch}"
            torch.testing.assert_close(alone, out[-1:], rtol=1e-3, atol=1e-4, msg=text)
        if "outputs" in made.elastic.values:
            outputs = made.elastic.values["outputs"](arch)
            assert sum(outputs) if isinstance(outputs, tuple) else outputs in out.shape, arch
    assert not (changed := differing(before, condition(made))), f"changes its {', '.join(changed)}"


def exports_to_plain_torch(make: Make, shape: Shape = None) -> None:
    """Under each arch it becomes layers of torch.nn that compute the same, with weights of their own."""
    with _in_double():
        model = nn.Sequential(layer(make))
        for arch in archs_of(model[0]):
            plain = export_subnet(model, arch, noise(model[0], arch, shape)[:1])
            assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


def computes_the_same_in_training_as_exported(make: Make, shape: Shape = None) -> None:
    """In training as well, statistics of the batch and gradients by the input included."""
    with _in_double():
        model = nn.Sequential(layer(make)).train()
        for arch in archs_of(model[0], 6):
            x = noise(model[0], arch, shape)
            plain = export_subnet(model, arch, x[:1])
            xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            with apply(model, arch):
                ours, theirs = model.train()(xs[0]), plain.train()(xs[1])
            torch.testing.assert_close(ours, theirs)
            weights = torch.linspace(-1, 1, ours.numel()).reshape(ours.shape)
            for out in (ours, theirs):
                if out.requires_grad:
                    (out * weights).sum().backward()
            torch.testing.assert_close(xs[0].grad, xs[1].grad)


def recalibrates_as_its_export_does(make: Make, shape: Shape = None) -> None:
    """Batch-norm statistics that are recomputed under an arch are those of its export, and stay."""
    task: Any = SimpleNamespace(forward=lambda model, batch: model(batch))
    with _in_double():
        model = nn.Sequential(layer(make))
        for arch in archs_of(model[0], 6):
            x = noise(model[0], arch, shape)
            plain = export_subnet(model.eval(), arch, x[:1])
            recalibrate(plain, task, [x, 2 * x + 1])
            with torch.no_grad(), apply(model, arch):
                recalibrate(model, task, [x, 2 * x + 1])
                torch.testing.assert_close(model(x), plain(x))


def costs_what_its_export_costs(make: Make, shape: Shape = None) -> None:
    """`cost` of its positions: flops are those that torch counts, params those that are there."""
    made = layer(make)
    model = nn.Sequential(made)
    if not hasattr(made, "cost"):
        assert not [*made.parameters(recurse=False)], "has weights and no `cost`"
        return
    for arch in archs_of(made):
        one = noise(made, arch, shape)[:1]
        plain = export_subnet(model, arch, one).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = plain(one)
        outputs = made.elastic.values["outputs"](arch)
        size = sum(outputs) if isinstance(outputs, tuple) else outputs
        inputs = [Constant(one.numel() // one.shape[1])] if costs_inputs(made) else []
        cost = made.cost(Constant(out.numel() // size), *inputs)
        params = sum(p.numel() for p in plain.parameters())
        assert (cost.flops(arch), cost.params(arch)) == (counter.get_total_flops() // 2, params), arch


def runs_what_its_gates_say(make: Make, shape: Shape = None) -> None:
    """`gates` gives children with a value that is 1 where the child runs and 0 where it does not."""
    made = layer(make)
    if not hasattr(made, "gates"):
        return
    ran: set[nn.Module] = set()
    gates = [*made.gates()]
    assert {child for child, _ in gates} <= {*made.modules()}
    for child, _ in gates:
        child.register_forward_hook(lambda module, args, output: ran.add(module))
    for arch in archs_of(made):
        ran.clear()
        with torch.no_grad(), apply(made, arch):
            made(noise(made, arch, shape))
        assert [int(gate(arch)) for _, gate in gates] == [int(child in ran) for child, _ in gates], arch


def trains_the_active_part_alone(make: Make, shape: Shape = None) -> None:
    """As many elements of its weights have a gradient as of those of the exported layer."""
    with _in_double():
        model = nn.Sequential(layer(make))
        for arch in archs_of(model[0], 6):
            x = noise(model[0], arch, shape)
            plain = export_subnet(model.eval(), arch, x[:1])
            ours, theirs = (_reached(net, arch, x) for net in (model, plain))
            assert ours == theirs, f"{ours} elements have a gradient, {theirs} of the exported layer: {arch}"


def _reached(model: nn.Module, arch: Choices, x: Tensor) -> int:
    """How many elements of the weights have a gradient in training, rounding apart."""
    model.zero_grad()
    with apply(model, arch):
        _backward(model.train()(x))
    gradients = [p.grad.abs() for p in model.parameters() if p.grad is not None]
    largest = max((float(gradient.max()) for gradient in gradients), default=0.0)
    return sum(int((gradient > 1e-12 * largest).sum()) for gradient in gradients)


def _backward(out: Tensor) -> None:
    """Give gradients of a sum in which each output counts for something else."""
    if out.requires_grad:
        (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()


def has_no_weight_that_no_arch_uses(make: Make, shape: Shape = None) -> None:
    """Each parameter that is trained has a gradient under some arch: what it computes hangs on it."""
    made = layer(make).train()
    for arch in archs_of(made):
        with apply(made, arch):
            _backward(made(noise(made, arch, shape)))
    idle = [name for name, p in made.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle, f"no gradient reaches {', '.join(idle)}, whatever the arch"


def can_be_copied_and_pickled(make: Make, shape: Shape = None) -> None:
    """A copy, one through pickle and one through `state_dict`, used or not, compute the same and share no weights."""
    made = layer(make)
    arch = archs_of(made)[-1]
    loaded = layer(make, seed=1)
    with torch.no_grad(), apply(made, arch), apply(loaded, arch):
        expected = made(noise(made, arch, shape))
        loaded(noise(made, arch, shape))  # what it keeps of its weights, if anything, has to follow them
    loaded.load_state_dict(made.state_dict())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        with torch.no_grad(), apply(other, arch):
            assert same(other(noise(other, arch, shape)), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in made.parameters()}


def builds_on_the_meta_device(make: Make, shape: Shape = None) -> None:
    """A supernet of any size can be looked at without its weights; no global generator but torch's is touched."""
    with torch.device("meta"), global_generators_untouched():
        made = make()
    assert {tensor.device.type for tensor in made.state_dict().values()} <= {"meta"}


mutable_checks = [
    states_its_values_and_begins_with_the_largest,
    takes_any_arch_for_a_while,
    exports_to_plain_torch,
    computes_the_same_in_training_as_exported,
    recalibrates_as_its_export_does,
    costs_what_its_export_costs,
    runs_what_its_gates_say,
    trains_the_active_part_alone,
    has_no_weight_that_no_arch_uses,
    can_be_copied_and_pickled,
    builds_on_the_meta_device,
]
"""What every searchable layer keeps to."""
