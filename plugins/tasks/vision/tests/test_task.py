"""What is learnt from the images: head, loss, accuracies."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas.value import Dimension
from corenas.variables import Variable
from corenas_mutable_slices import LinearSlice
from corenas_task_vision import Classification
from corenas_task_vision.task import Accuracies, Head


def start(**options):
    return Classification("digits", **options).start(np.random.default_rng(0), data=False)


def ranked(scores, labels):
    """Percent of labels among the best one and five, by numpy."""
    order = np.argsort(-scores, axis=1)
    return {f"top{k}": 100 * np.mean([y in row[:k] for y, row in zip(labels, order, strict=True)]) for k in (1, 5)}


def test_accuracies_are_those_of_numpy():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(103, 10)), rng.integers(0, 10, 103)
    meter = start().meter()
    for part in (slice(0, 60), slice(60, 103)):
        meter.update(torch.tensor(scores[part]), (None, torch.tensor(labels[part])))
    assert meter.compute() == pytest.approx(ranked(scores, labels))


def test_the_meter_computes_what_the_task_says():
    task = start()
    meter = task.meter()
    meter.update(torch.eye(10), (None, torch.arange(10)))
    assert meter.compute().keys() == task.metrics.keys()
    assert {metric.unit for metric in task.metrics.values()} == {"%"}
    assert meter.compute() == {"top1": 100, "top5": 100}


def test_a_net_that_has_diverged_is_right_nowhere():
    meter = Accuracies((1, 5))
    meter.update(torch.full((4, 10), torch.nan), (None, torch.arange(4)))
    assert meter.compute() == {"top1": 0, "top5": 0}


def test_the_scores_of_images_are_what_the_accuracies_are_means_of():
    meter, generator = Accuracies((1, 5)), torch.Generator().manual_seed(0)
    for n in (30, 7):
        outputs, labels = torch.randn(n, 10, generator=generator), torch.randint(10, (n,), generator=generator)
        meter.update(outputs, (None, labels))
    assert torch.equal(meter.scores("top1")[30:], outputs.argmax(1) == labels)
    for metric, accuracy in meter.compute().items():
        assert 100 * float(meter.scores(metric).double().mean()) == pytest.approx(accuracy)
    assert meter.scores("balanced") is None


def test_no_images_have_no_accuracy():
    assert np.isnan(Accuracies((1,)).compute()["top1"])


def test_label_smoothing_is_in_the_loss_and_in_nothing_else():
    scores, labels = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    plain, smooth = start(), start(label_smoothing=0.2)
    logs = scores.log_softmax(1)
    hard, spread = -logs[range(8), labels].mean(), -logs.mean()
    torch.testing.assert_close(plain.loss(scores, (None, labels)), hard)
    torch.testing.assert_close(smooth.loss(scores, (None, labels)), 0.8 * hard + 0.2 * spread)
    results = []
    for task in (plain, smooth):
        meter = task.meter()
        meter.update(task.logits(scores), (None, labels))
        results.append(meter.compute())
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (2, 8, 1, 1), (2, 8)])
def test_the_head_pools_maps_and_takes_vectors(shape):
    head = start(dropout=0.5).head([Dimension.of(4), Dimension.of(8)]).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pooled = x.mean((2, 3)) if x.dim() == 4 else x
    expected = pooled @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head([torch.zeros(1), x]), expected)


def test_the_head_drops_features_in_training_alone():
    head = start(dropout=0.5).head([Dimension.of(64)])
    x = torch.ones(1, 64, 1, 1)
    assert not torch.equal(head([x]), head([x]))
    assert torch.equal(head.eval()([x]), head([x]))


def test_the_head_can_be_traced_and_sliced():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head(Dimension.of(Variable("w", (4, 8))), 10, 0.1)

        def forward(self, x):
            return self.head([x])

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, LinearSlice) or super().is_leaf_module(m, module_qualified_name)

    net = Net().eval()
    traced = fx.GraphModule(net, Tracer().trace(net))
    for width in (4, 8):
        with apply(net, {"w": width}):
            x = torch.randn(3, width, 6, 6)
            assert torch.equal(traced(x), net(x))
            assert net(x).shape == (3, 10)


class Levels(nn.Module):
    """Pixels as features, twice."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head([x.flatten(1)[:, :5], x.flatten(1)])


def test_auxiliary_classifiers_count_in_the_training_loss_alone():
    task = start(auxiliary=0.4, label_smoothing=0.1)
    model = Levels(task.head([Dimension.of(5), Dimension.of(64)]))
    batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    outputs = task.forward(model, batch)
    main, aux = (nn.functional.cross_entropy(part, batch[1], label_smoothing=0.1) for part in outputs)
    torch.testing.assert_close(task.loss(outputs, batch), main + 0.4 * aux)
    task.loss(outputs, batch).backward()
    assert model.head.auxiliary[0].weight.grad.abs().max() > 0
    meters = [task.meter(), task.meter()]
    meters[0].update(outputs, batch)
    evaluated = task.forward(model.eval(), batch)
    meters[1].update(evaluated, batch)
    assert torch.equal(task.logits(outputs), evaluated)
    assert torch.equal(task.logits(evaluated), evaluated)
    assert meters[0].compute() == meters[1].compute()
    torch.testing.assert_close(task.loss(evaluated, batch), main)


def test_auxiliary_classifiers_are_neither_exported_nor_part_of_the_cost():
    example, space = torch.zeros(1, 1, 8, 8), SearchSpace([])
    networks = [Levels(start(auxiliary=weight).head([Dimension.of(5), Dimension.of(64)])).eval() for weight in (0, 0.4)]
    costs = [Cost(network, space, example).of([space.default()]) for network in networks]
    assert costs[0] == costs[1] == [{"flops": 640, "params": 650, "activations": 10}]
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [650, 710]
    for network in networks:
        assert sum(p.numel() for p in export_subnet(network, {}, example).parameters()) == 650


def test_without_features_before_the_last_there_is_no_auxiliary_classifier():
    # One spec may search without auxiliary features and retrain with them.
    head = start(auxiliary=0.4).head([Dimension.of(8)])
    assert isinstance(head([torch.zeros(2, 8)]), torch.Tensor)


def test_the_model_sees_the_images_of_a_batch():
    task = start()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(task.forward(model, (images, torch.arange(3))), model(images))


def test_the_fingerprint_is_that_of_the_images_and_their_cut():
    options = Classification("digits")
    same, other = (options.start(np.random.default_rng(seed)).fingerprint for seed in (0, 1))
    assert options.start(np.random.default_rng(0)).fingerprint == same != other
    assert Classification("mnist5k").start(np.random.default_rng(0)).fingerprint != same
