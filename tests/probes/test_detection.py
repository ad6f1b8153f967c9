"""A task that is no classification: boxes of any number, features of two levels, a metric that is no mean."""

import torch
import torch.nn.functional as F
import toys
from attrs import frozen
from torch import nn

from corenas.contracts import Metric
from corenas.export import export_subnet
from corenas.run.prepare import load_supernet, prepare
from corenas.run.stages import run_spec


class Body(toys.Body):
    """The features after the stem and after a second, smaller map."""

    def __init__(self, tree):
        super().__init__(tree)
        self.down = toys.Conv(tree["width"], tree["width"], 3, stride=2)
        self.feat_dims = [*self.feat_dims, self.feat_dims[0]]

    def features(self, x):
        (fine,) = super().features(x)
        return [fine, F.relu(self.down(fine))]


class Head(nn.Module):
    """For each cell of each level the logit that an object of its size stands there."""

    def __init__(self, dims):
        super().__init__()
        self.levels = nn.ModuleList(toys.Conv(dim, 1) for dim in dims)

    def forward(self, features):
        fine, coarse = features
        return torch.cat([self.levels[0](fine).flatten(1), self.levels[1](coarse).flatten(1)], 1)


class Scenes:
    """Noise with up to three squares of 2 or 4 pixels; target: the cells (of 16 fine, 4 coarse) where they are."""

    def __init__(self, size, seed):
        rng = torch.Generator().manual_seed(seed)
        self.items = []
        for _ in range(size):
            cells = torch.randperm(20, generator=rng)[: int(torch.randint(4, (), generator=rng))]
            image = 0.2 * torch.randn(1, 8, 8, generator=rng)
            for cell in cells.tolist():
                side, n, place = (2, 4, cell) if cell < 16 else (4, 2, cell - 16)
                y, x = side * (place // n), side * (place % n)
                image[0, y : y + side, x : x + side] += 1.5 if side == 2 else -1.5
            self.items.append((image, cells))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def collate(self, samples):
        return torch.stack([image for image, _ in samples]), [cells for _, cells in samples]


class AveragePrecision:
    """The area under precision over recall of all cells of all images: no mean over images."""

    def __init__(self):
        self.scores, self.right = [], []

    def update(self, outputs, batch):
        self.scores.append(outputs.flatten())
        self.right.append(targets(outputs, batch[1]).flatten())

    def compute(self):
        right = torch.cat(self.right)[torch.cat(self.scores).argsort(descending=True)]
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        return {"ap": 100 * float((precision * right).sum() / right.sum())}


def targets(outputs, cells):
    target = torch.zeros_like(outputs)
    for row, own in zip(target, cells, strict=True):
        row[own] = 1
    return target


class LiveDetection:
    example, metrics, splits = (
        torch.zeros(1, 1, 8, 8),
        {"ap": Metric("%", "max")},
        {"train": 192, "valid": 64, "test": 64},
    )

    def dataset(self, split, augmented):
        return Scenes(self.splits[split], ["train", "valid", "test"].index(split))

    def head(self, dims):
        return Head(dims)

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.binary_cross_entropy_with_logits(outputs, targets(outputs, batch[1]))

    def logits(self, outputs):
        return None

    def meter(self):
        return AveragePrecision()


@frozen
class Detection:
    """Find the squares."""

    def start(self, rng, data=True):
        return LiveDetection()


@frozen
class TwoLevels:
    """The toy network with two levels."""

    def build(self, space):
        return Body(space.tree)


def test_a_detector_is_trained_in_parts_searched_exported_and_tested(tmp_path):
    catalogue = toys.make_catalogue(tasks=Detection, backbones=TwoLevels)
    train = {"epochs": 8, "batch_size": 32, "accumulate": 3, "optimizer": {"type": "AdamW", "lr": 0.02}}
    search = {"trials": 6, "objectives": ["ap"], "constraints": {"flops": "80%"}}
    spec = toys.make_spec(tmp_path, catalogue, train=train, search=search, calibration={"batches": 2})
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert result["best"]["test"]["ap"] > 40  # cells hold an object in 8 % of the cases
    prepared = prepare(spec)
    plain = export_subnet(
        load_supernet(prepared, tmp_path / "run").eval(), result["best"]["arch"], prepared.task.example
    )
    assert plain(torch.zeros(2, 1, 8, 8)).shape == (2, 20)
