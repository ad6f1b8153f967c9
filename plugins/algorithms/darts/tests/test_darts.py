import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.func import functional_call

from corenas.cli import main
from corenas.contracts import Algorithm, AlgorithmContext, Metric, Progress
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.testing.algorithms import algorithm_checks, own_loop, scene
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import condition, differing
from corenas.variables import Categorical, Int
from corenas_algorithm_darts import DARTS, corenas_algorithms
from corenas_algorithm_darts.trainer import (
    derive_arch,
    first_order_gradient,
    mixed_variables,
    second_order_gradient,
    standing_at,
)
from corenas_mutable_slices import ElasticDepth, MixedOp

SPECS = Path(__file__).parents[4] / "spec"
HERE = Path(__file__).parent


@pytest.mark.parametrize("check", algorithm_checks)
@pytest.mark.parametrize("order", [1, 2])
def test_conforms(order, check):
    check(DARTS(order=order, lr=0.01))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_darts")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"darts": DARTS}
    assert isinstance(DARTS(), Algorithm)
    assert DARTS.stages == ("train", "derive", "retrain")
    with pytest.raises(ValueError, match="less than 1"):
        DARTS(betas=(0.5, 1.0))


# -- gradients against what torch.func says ----------------------------------------------------------------------------

OPS = ("deep", "linear", "skip")
SPACE = SearchSpace([Categorical("first", OPS), Categorical("second", OPS)])


def network(act):
    def choice(key):
        deep = nn.Sequential(nn.Linear(6, 6), act(), nn.Linear(6, 6))
        return MixedOp({"deep": deep, "linear": nn.Linear(6, 6), "skip": nn.Identity()}, SPACE.value(key))

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), act(), choice("first"), act(), choice("second"), nn.Linear(6, 3)).double()


class Points:
    """Three classes; the batch after the n-th training batch is the n-th validation batch."""

    example = torch.zeros(1, 6)
    metrics = {"top1": Metric("%")}  # noqa: RUF012

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])


def points(seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(12, 6, dtype=torch.float64, generator=rng), torch.randint(3, (12,), generator=rng)


def start(act, order=2, **options):
    """A trainer with architecture weights that are not all alike, and a step whose optimizer has momentum already."""
    model = network(act)
    context = AlgorithmContext(model, SPACE, None, Points(), Train(), torch.device("cpu"))  # type: ignore[arg-type]
    trainer = DARTS(order=order, **options).start(context)
    for seed, alpha in enumerate(trainer.alphas.values()):
        alpha.data = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    F.cross_entropy(model(points(5)[0]), points(5)[1]).backward()  # of default archs: some weights have no momentum
    optimizer.step()
    optimizer.zero_grad()
    step = SimpleNamespace(
        archs=[], optimizer=optimizer, lr=0.3, index=0, part=0, rng=None, mean=lambda tensors: tensors,
        more=lambda split, augmented=False: points(2), backward=lambda loss: (loss.backward(), loss.detach())[1],
    )  # fmt: skip
    return trainer, step


def exact(trainer, step, train, valid):
    """The gradient by alpha of L_val(w - lr (momentum velocity + dL_train/dw + decay w), alpha), by torch.func."""
    model, optimizer = trainer.supernet, step.optimizer
    weights = {name: w.detach() for name, w in model.named_parameters()}
    zero = torch.zeros(())
    velocity = {n: optimizer.state.get(w, {}).get("momentum_buffer", zero) for n, w in model.named_parameters()}

    def loss(weights, alphas, batch):
        with apply(model, {key: alpha.softmax(0) for key, alpha in alphas.items()}):
            return F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    def unrolled(alphas):
        gradients = torch.func.grad(loss)(weights, alphas, train)
        moved = {n: w - 0.3 * (0.9 * velocity[n] + gradients[n] + 0.01 * w) for n, w in weights.items()}
        return loss(moved, alphas, valid)

    return torch.func.grad(unrolled)({key: alpha.detach() for key, alpha in trainer.alphas.items()})


def test_the_second_order_gradient_is_the_exact_one():
    trainer, step = start(nn.Tanh)
    train, valid = points(1), points(2)
    expected = exact(trainer, step, train, valid)
    before = condition(trainer.supernet)
    _, gradients = second_order_gradient(
        lambda: trainer._loss(train, trainer.alphas), lambda: trainer._loss(valid, trainer.alphas),
        [*trainer.alphas.values()], step,
    )  # fmt: skip
    first = first_order_gradient(lambda: trainer._loss(valid, trainer.alphas), [*trainer.alphas.values()], step)[1]
    for gradient, key, crude in zip(gradients, trainer.alphas, first, strict=True):
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(crude, expected[key], rtol=1e-2)  # what is tested is not the first order
    assert differing(before, condition(trainer.supernet)) == []


def test_with_relu_it_is_the_formula_of_the_paper():
    """Eq. 7 and 8 once more, on copies of the network."""
    trainer, step = start(nn.ReLU)
    train, valid, alphas = points(1), points(2), [*trainer.alphas.values()]
    model, optimizer = trainer.supernet, step.optimizer

    def loss(copied, batch):
        with apply(copied, {key: alpha.softmax(0) for key, alpha in trainer.alphas.items()}):
            return F.cross_entropy(copied(batch[0]), batch[1])

    def moved(deltas):
        other = copy.deepcopy(model)
        for w, delta in zip(other.parameters(), deltas, strict=True):
            w.data += delta
        return other

    slopes = torch.autograd.grad(loss(model, train), [*model.parameters()])
    buffers = [optimizer.state.get(w, {}).get("momentum_buffer", 0.0) for w in model.parameters()]
    step_of = [
        -0.3 * (0.9 * b + g + 0.01 * w.detach()) for b, g, w in zip(buffers, slopes, model.parameters(), strict=True)
    ]
    unrolled = moved(step_of)
    own = torch.autograd.grad(loss(unrolled, valid), [*alphas, *unrolled.parameters()])
    vector = own[2:]
    r = 0.01 / torch.cat([v.flatten() for v in vector]).norm()
    plus = torch.autograd.grad(loss(moved([r * v for v in vector]), train), alphas)
    minus = torch.autograd.grad(loss(moved([-r * v for v in vector]), train), alphas)
    expected = [o - 0.3 * (p - m) / (2 * r) for o, p, m in zip(own[:2], plus, minus, strict=True)]
    _, gradients = second_order_gradient(
        lambda: trainer._loss(train, trainer.alphas), lambda: trainer._loss(valid, trainer.alphas), alphas, step
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_the_quadratic_has_its_analytic_gradient():
    """L_train = (w - a)^2 / 2, L_val = w^2 / 2: w' = w - lr (w - a), so dL_val/da = lr w'."""
    w, a = (nn.Parameter(torch.tensor(number, dtype=torch.float64)) for number in (2.0, 0.5))
    optimizer = torch.optim.SGD([w], lr=0.1)
    step = SimpleNamespace(optimizer=optimizer, lr=0.1, mean=lambda tensors: tensors)
    loss, (gradient,) = second_order_gradient(lambda: (w - a) ** 2 / 2, lambda: w**2 / 2, [a], step)
    assert float(loss) == pytest.approx(1.85**2 / 2)
    assert float(gradient) == pytest.approx(0.1 * 1.85, rel=1e-9)
    assert float(first_order_gradient(lambda: w**2 / 2, [a], step)[1][0]) == 0.0
    assert float(w.detach()) == 2.0


def test_where_validation_is_perfect_nothing_is_divided_by_zero():
    w, a = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    step = SimpleNamespace(optimizer=torch.optim.SGD([w], lr=0.1), lr=0.1, mean=lambda tensors: tensors)
    _, (gradient,) = second_order_gradient(lambda: (w - a) ** 2 / 2, lambda: w**2 / 2, [a], step)
    assert float(gradient) == 0.0


def test_weights_that_stood_elsewhere_are_the_same_tensors_even_after_an_error():
    w = nn.Parameter(torch.ones(2))
    place = w.data_ptr()
    with standing_at([w], [torch.zeros(2)]):
        assert not w.any()
    assert w.all()
    with pytest.raises(ZeroDivisionError), standing_at([w], [torch.zeros(2)]):
        _ = 1 / 0
    assert w.all()
    assert w.data_ptr() == place


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_moves_alpha_by_adam_then_the_weights_by_the_new_alpha(order):
    trainer, step = start(nn.Tanh, order, lr=0.05, betas=(0.5, 0.999), weight_decay=0.1)
    train, valid, alphas = points(1), points(2), [*trainer.alphas.values()]
    twin = copy.deepcopy(alphas)
    adam = torch.optim.Adam(twin, 0.05, betas=(0.5, 0.999), weight_decay=0.1)
    losses = (lambda: trainer._loss(train, trainer.alphas)), (lambda: trainer._loss(valid, trainer.alphas))
    loss, gradients = second_order_gradient(*losses, alphas, step) if order == 2 else first_order_gradient(
        losses[1], alphas, step)  # fmt: skip
    for alpha, gradient in zip(twin, gradients, strict=True):
        alpha.grad = gradient
    adam.step()
    figures = trainer.train_step(train, step)
    assert torch.equal(figures["valid_loss"], loss)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(alphas, twin, strict=True))
    wanted = torch.autograd.grad(trainer._loss(train, trainer.alphas), [*trainer.supernet.parameters()])
    for w, gradient in zip(trainer.supernet.parameters(), wanted, strict=True):
        torch.testing.assert_close(w.grad, gradient)


def test_statistics_are_those_of_training_batches_alone():
    trainer, step = start(nn.Tanh)
    trainer.supernet.insert(1, nn.BatchNorm1d(6).double())
    step.optimizer.add_param_group({"params": [*trainer.supernet[1].parameters()]})
    trainer.train_step(points(1), step)
    norm = trainer.supernet[1]
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * trainer.supernet[0](points(1)[0]).mean(0).detach())


@pytest.mark.parametrize(("order", "looks"), [(1, 1), (2, 4)])
def test_the_step_of_the_weights_alone_has_dropout(order, looks):
    this, seen = scene(DARTS(order=order), dropout=0.5), []
    dropout = next(module for module in this.model.modules() if isinstance(module, nn.Dropout))
    dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    for _ in own_loop(this, 2):
        assert seen == [*[False] * looks, True]
        seen.clear()


def test_only_the_first_part_of_a_batch_moves_alpha():
    trainer, step = start(nn.Tanh)
    trainer.train_step(points(1), step)
    before = trainer.state_dict()["alphas"]
    step.part = 1
    figures = trainer.train_step(points(3), step)
    assert {*figures} == {"loss", "valid_loss"}
    assert all(torch.equal(alpha, before[key]) for key, alpha in trainer.alphas.items())


def test_validation_batches_come_augmented_from_a_stream_of_their_own():
    trainer, step = start(nn.Tanh)
    asked = []
    step.more = lambda split, augmented=False: asked.append((split, augmented)) or points(2)
    trainer.train_step(points(1), step)
    assert asked == [("valid", True)]


def test_a_loop_of_ones_own_finds_the_operation_that_helps():
    this = scene(DARTS(lr=0.05))
    before = {key: alpha.detach().clone() for key, alpha in this.trainer.alphas.items()}
    figures = [{name: float(figure) for name, figure in figures.items()} for _, figures in own_loop(this, 30)]
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert figures[-1]["valid_loss"] < figures[0]["valid_loss"]
    assert not torch.equal(this.trainer.alphas["op"], before["op"])
    assert this.trainer.derive()["op"] in ("conv", "pool", "skip")


def test_a_state_of_another_space_is_refused():
    trainer, _ = start(nn.Tanh)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="another space"):
        trainer.load_state_dict({**state, "alphas": {"first": state["alphas"]["first"]}})


# -- what is relaxed ---------------------------------------------------------------------------------------------------


def test_a_network_without_mixed_operations_is_refused():
    space = SearchSpace([Int("depth", 1, 2)])
    model = ElasticDepth([nn.Linear(6, 6), nn.Linear(6, 6)], space.value("depth"))
    with pytest.raises(UserError, match="no layer of this network can mix"):
        mixed_variables(model, space)


def test_variables_that_a_layer_needs_as_a_number_stay_at_their_default():
    space = SearchSpace([Categorical("op", ("a", "b")), Int("n", 1, 2)])
    both = {"a": nn.Identity(), "b": nn.Linear(6, 6)}
    numbered = MixedOp({1: nn.Identity(), 2: nn.Linear(6, 6)}, space.value("n"))
    model = nn.Sequential(MixedOp(both, space.value("op")), numbered)
    assert mixed_variables(model, space) == {"op": ("a", "b"), "n": (1, 2)}
    model.append(ElasticDepth([nn.Linear(6, 6), nn.Linear(6, 6)], space.value("n")))
    assert mixed_variables(model, space) == {"op": ("a", "b")}


def test_layers_that_mix_other_operations_under_one_variable_are_refused():
    value = SPACE.value("first")
    ops = {op: nn.Identity() for op in OPS}
    model = nn.Sequential(MixedOp(ops, value), MixedOp({"none": nn.Identity(), **ops}, value))
    with pytest.raises(UserError, match="mix other operations"):
        mixed_variables(model, SPACE)


# -- what is derived ---------------------------------------------------------------------------------------------------

PRIMITIVES = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
    "dil_conv_5x5",
)  # fmt: skip
CELLS = SearchSpace.from_table(tomli.loads((SPECS / "space" / "darts.toml").read_text()))
EDGES = [key for key in CELLS.keys if key.endswith(".op")]
SEP, SKIP, DIL, MAX = "sep_conv_3x3", "skip_connect", "dil_conv_3x3", "max_pool_3x3"
DARTS_V2 = {  # of each node the operation on each of two states, as published
    "normal": [{0: SEP, 1: SEP}, {0: SEP, 1: SEP}, {1: SEP, 0: SKIP}, {0: SKIP, 2: DIL}],
    "reduce": [{0: MAX, 1: MAX}, {2: SKIP, 1: MAX}, {0: MAX, 2: SKIP}, {2: SKIP, 1: MAX}],
}


def choices_of(cells):
    """The arch in which each node takes the edges of these states."""
    choices = {}
    for kind, nodes in cells.items():
        for i, node in enumerate(nodes):
            if i:
                choices[f"{kind}.nodes.{i}.take"] = " ".join(map(str, sorted(node)))
            choices |= {f"{kind}.nodes.{i}.edges.{state}.op": op for state, op in node.items()}
    return CELLS.arch(choices)


def test_darts_v2_is_derived_from_weights_made_by_hand():
    weights = {}
    for key in EDGES:
        kind, _, node, _, edge, _ = key.split(".")
        op = DARTS_V2[kind][int(node)].get(int(edge))
        # An edge that is not taken is all "none"; one that is taken still has more of "none" than of its operation.
        row = torch.full((8,), 0.01)
        row[0] = 0.53 if op else 0.83
        row[PRIMITIVES.index(op or "dil_conv_5x5")] = 0.41 if op else 0.11
        weights[key] = row
    assert derive_arch(CELLS, dict.fromkeys(EDGES, PRIMITIVES), weights) == choices_of(DARTS_V2)


def test_random_weights_are_read_as_the_paper_reads_them():
    rng = torch.Generator().manual_seed(0)
    for _ in range(30):
        weights = {key: (2 * torch.randn(8, generator=rng)).softmax(0) for key in EDGES}
        cells = {kind: [] for kind in ("normal", "reduce")}
        for kind, nodes in cells.items():
            for i in range(4):
                rows = [weights[f"{kind}.nodes.{i}.edges.{state}.op"] for state in range(i + 2)]
                strongest = sorted(range(i + 2), key=lambda state: -float(rows[state][1:].max()))[:2]
                nodes.append({state: PRIMITIVES[1 + int(rows[state][1:].argmax())] for state in strongest})
        assert derive_arch(CELLS, dict.fromkeys(EDGES, PRIMITIVES), weights) == choices_of(cells)


def test_in_the_search_network_all_edges_have_weights_of_their_own():
    options = load_catalogue().options("backbones", {"type": "darts", "channels": 4, "layers": 3})
    names = mixed_variables(options.build(CELLS), CELLS)
    assert names == dict.fromkeys(EDGES, PRIMITIVES)
    assert len(names) == 2 * 14


def test_none_is_not_derived_where_it_is_a_choice_and_what_is_not_relaxed_stays_at_its_default():
    space = SearchSpace.from_table({"op": ["none", "a", "b"], "depth": [1, 2], "width": [4, 8]})
    names = {"op": ("none", "a", "b")}
    arch = derive_arch(space, names, {"op": torch.tensor([0.9, 0.04, 0.06])})
    assert dict(arch) == {"op": "b", "depth": 2, "width": 8}


def test_a_depth_is_not_derived_from_what_it_makes_active():
    space = SearchSpace.from_table(
        {"depth": {"type": "int", "low": 1, "high": 2, "default": 1}, "block": {"op": ["a", "b"]}}
    )
    keys = [key for key in space.keys if key.endswith("op")]
    arch = derive_arch(space, dict.fromkeys(keys, ("a", "b")), dict.fromkeys(keys, torch.tensor([0.2, 0.8])))
    assert dict(arch) == {"depth": 1, "blocks.0.op": "b", "blocks.1.op": "a"}  # idle: at its default


# -- whole runs --------------------------------------------------------------------------------------------------------

SMALL = [
    "train.epochs=2", "retrain.train.epochs=2", "backbone.channels=2", "retrain.backbone.channels=4",
    'export.formats=["safetensors"]',
]  # fmt: skip


def run(folder, killed=lambda event: False):
    """Run the reference spec with less of everything, until an event kills it."""
    spec, _, catalogue = open_spec(SPECS / "darts.toml", SMALL)

    def emit(event):
        if killed(event):
            raise KeyboardInterrupt

    return run_spec(spec, catalogue, folder, emit)


def outcome(folder):
    """What a run ends with, times apart."""
    store = Store(folder / "run.sqlite", readonly=True)
    network = (folder / "best" / "network.safetensors").read_bytes()
    return store.get("result")["table"], store.curve("train"), store.curve("retrain"), network


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("darts") / "run"
    run(folder)
    return folder


def test_what_is_derived_is_trained_wider_and_deeper(whole):
    (row,), curve, again, _ = outcome(whole)
    assert (len(curve), len(again)) == (2, 2)
    assert row["test"]["top1"] > 30
    card = json.loads((whole / "best" / "cost.json").read_text())
    assert card["params"] > 2 * row["metrics"]["params"]  # twice the channels, one cell more


def test_killed_in_both_trainings_it_ends_with_the_same_bits(whole, tmp_path):
    for stage in ("train", "retrain"):

        def killed(event, stage=stage):
            return isinstance(event, Progress) and event.stage == stage and event.point

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", killed)
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("other", ["valid=300", "test=300", "data=mnist5k"])
def test_a_task_of_retraining_that_cuts_the_data_otherwise_is_refused(other):
    spec, _, _ = open_spec(SPECS / "darts.toml", [f"retrain.task.{other}"])
    with pytest.raises(UserError, match=r"retrain\.task: this is other data than `task` has"):
        prepare(spec, weights=False)


def test_a_mistake_in_the_task_of_retraining_is_told_before_anything_is_trained():
    spec, _, _ = open_spec(SPECS / "darts.toml", ['retrain.task.augment=["Cutoff"]'])
    with pytest.raises(UserError, match=r"retrain\.task\.augment\[0\]\.type.*\n.*'Cutout'"):
        prepare(spec, data=False, weights=False)


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    """What a training ends with, for orders 1 and 2 each: of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    for launcher, name in ([], "one"), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "two"):
        command = [sys.executable, *launcher, str(HERE / "processes.py"), str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(folder / name, weights_only=True) for name in ("one", "two"))
    return {order: (one[order], two[order]) for order in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_two_processes_have_the_architecture_weights_of_one(by_processes, order):
    one, two = by_processes[order]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert float(one["trainer"]["alphas"]["op"].abs().max()) > 0.01
    torch.testing.assert_close(two["trainer"]["alphas"], one["trainer"]["alphas"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-6, atol=1e-9)


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert isinstance(load_catalogue().options("algorithms", spec["algorithm"]), DARTS)


# -- the paper's recipes -----------------------------------------------------------------------------------------------


def test_the_recipe_for_cifar10_needs_no_data_to_be_checked(capsys):
    assert main(["check", "--no-data", str(SPECS / "darts-cifar10.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_imagenet_trains_the_cells_that_were_published():
    spec, _, _ = open_spec(SPECS / "imagenet" / "darts.toml")
    assert CELLS.arch(spec.space.default()) == choices_of(DARTS_V2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pictures of two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 4)):
        for name in ("one", "two"):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("darts-cifar10.toml", 32), ("imagenet/darts.toml", 192)])
def test_the_recipes_of_the_paper_run(name, size, folder, tmp_path):
    """Two steps of each training, on a few images and with few channels; all else as it is written."""
    cifar, data = size == 32, f'{{ type = "folder", root = "{folder}", test = "val" }}'
    settings = [
        f"task.data={data}", "task.valid=10", f"task.size={size}", "retrain.train.epochs=1",
        "retrain.train.batch_size=10", "retrain.train.workers=0", "export.formats=[]",
    ]  # fmt: skip
    if cifar:
        settings += [
            "task.classes=2", f"retrain.task.data={data}", "retrain.task.valid=10", "retrain.task.size=32",
            "retrain.task.classes=2", "train.epochs=1", "train.batch_size=6", "train.workers=0",
            "backbone.channels=2", "backbone.layers=3", "retrain.backbone.channels=2", "retrain.backbone.layers=5",
        ]  # fmt: skip
    else:
        settings += ["task.classes=2", "backbone.channels=4", "backbone.layers=5"]
    spec, _, catalogue = open_spec(SPECS / name, settings)
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert 0 <= result["best"]["test"]["top1"] <= 100
    store = Store(tmp_path / "run" / "run.sqlite", readonly=True)
    assert len(store.curve("train")) == int(cifar)
    assert len(store.curve("retrain")) == 1
