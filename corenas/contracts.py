"""What components fulfil: the page to read after `hookspecs`.

Every component is a frozen attrs class of options with one verb that makes the live thing (`start` or `build`). Live
things get one context object, which can grow, and give their state as plain data. Nothing here imports torch.
"""

# pyright: reportReturnType=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from attrs import field, frozen

from corenas.objectives import Constraint, Objectives, Trial
from corenas.settings import Train
from corenas.space import Arch, Codes, SearchSpace
from corenas.value import Dimension
from corenas.variables import Variable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from corenas.cost import Cost

Json: TypeAlias = Any
"""None, numbers, strings, lists and mappings of these."""

# -- what is trained --------------------------------------------------------------------------------------------------


@runtime_checkable
class Backbone(Protocol):
    """Options of a network without its head.

    Its class may be `LaidOut`, `Exemplary` and `SpaceGiving`, its options `Fingerprinted`. Optional: `in_channels`,
    which is that of the task's images where None.
    """

    def build(self, space: SearchSpace) -> nn.Module:
        """Return a module with `features(x) -> [Tensor, …]` and `feat_dims`, the dimension of each of these tensors.

        Its `forward` gives the features as well, so that it can be called, counted and exported without a head.
        It may be `Segmented` and `Headed`; any module in it `ProgressTracking`, `ZeroInitializing` or
        `RunningStatistics`. Raises UserError if the space is none for it.
        """


@runtime_checkable
class LaidOut(Protocol):
    """A backbone's class that says which tables its spaces have, so that `corenas check` reads them without torch.

    layout: the attrs class of the tables
    """

    layout: type


@runtime_checkable
class SpaceGiving(Protocol):
    """A backbone that gives the space itself: a spec may then say none, or only `fix` and `narrow`."""

    def space(self) -> SearchSpace:
        """Return all that it can be. Raises UserError, keys relative to the spec, where there is no such thing."""


@runtime_checkable
class Headed(Protocol):
    """A network that has a head of its own, which is used in place of the task's."""

    own_head: nn.Module


@runtime_checkable
class Exemplary(Protocol):
    """A backbone's class with something small to try it on, as tests and `corenas show` do.

    example: the tables `backbone` (options) and `space` of a spec for images of 28x28 with one channel, trained
        in seconds
    """

    example: Mapping[str, Mapping[str, Any]]


@runtime_checkable
class Segmented(Protocol):
    """A network that names its parts in order, whose outputs a distiller may want (`LiveDistiller.taps`).

    A part that is `Gated` may name its own: those that run under an arch run one after the other, and nothing else in
    it does. Archs that agree on the first parts of a network share their outputs when they are measured.
    """

    segments: Sequence[nn.Module]


@runtime_checkable
class Pretrained(Protocol):
    """A backbone that can begin with weights from a file.

    weights: the file, None where weights are drawn
    """

    weights: str | None

    def load(self, model: nn.Module, space: SearchSpace) -> Sequence[str]:
        """Give a supernet, or a network of one arch, the weights of the file; called after `build`, with the head on.

        What they say nothing of stays. On the meta device only names and shapes are read, to see whether they fit.
        Returns what of the file is left out, a sentence for each. Raises UserError for a file that cannot be read, or
        fits nothing in the space.
        """


@frozen
class Metric:
    """What a number means.

    unit: as it is printed, "%" for instance
    direction: whether more is better
    share: whether it is the percentage of a split's samples that are right: it is then told with a binomial error
    """

    unit: str = ""
    direction: Literal["max", "min"] = "max"
    share: bool = False


class Meter(Protocol):
    """Collects what a metric needs over the batches of a data set."""

    def update(self, outputs: Any, batch: Any) -> None:
        """Take in the outputs for a batch."""

    def compute(self) -> Mapping[str, float]:
        """Return the metrics over all that was seen."""


@runtime_checkable
class Itemised(Protocol):
    """A meter that knows what each sample adds to a metric, so that archs can race (`[search] racing`)."""

    def scores(self, metric: str) -> Tensor | None:
        """Return the scores of all samples so far, in order, from 0 to 1, more is better: their mean is the metric.

        Up to a factor. None for a metric that is no such mean.
        """
        ...


class LiveTask(Protocol):
    """Data with what is to be learnt from it. Valid and test never meet train, nor each other.

    example: one input of the model: a tensor such as (1, channels, height, width), or any tree of them, a tuple for
        positional arguments, a dict for those by keyword (`corenas.mutable.as_arguments`)
    metrics: what its meter computes
    splits: how many samples each split has: "train", "valid", "test"
    It may be `Fingerprinted` and `Preprocessing`. Optional: `notes`, what a person should know of the data, and `cut`,
    how its splits were made and whether a sample may be in two of them, both in words.
    """

    @property
    def example(self) -> Any:
        """One input."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What is measured."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Sizes."""

    def dataset(self, split: str, augmented: bool) -> torch.utils.data.Dataset[Any]:
        """Return a map-style data set; augmentation draws from torch's global generator, which the caller seeds.

        It may be `Collating` and `InMemory`.
        """

    def head(self, feat_dims: Sequence[Dimension]) -> nn.Module:
        """Return what turns a backbone's features into outputs; (list of features) -> outputs."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's outputs for a batch."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return what training minimises: a scalar."""

    def logits(self, outputs: Any) -> Tensor | None:
        """Return what can be distilled: rows of logits, each of one distribution, or None where there are none.

        (n, classes); of several answers an image, each yes or no, (n * answers, 2).
        """

    def meter(self) -> Meter:
        """Return a new meter."""


@runtime_checkable
class Task(Protocol):
    """Options of a task."""

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveTask:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken.

        data: False reads nothing and knows `example`, `metrics` and `head` all the same, for costs and checks; `splits`
            is then empty
        """


@runtime_checkable
class ProgressTracking(Protocol):
    """A module that changes as a training goes on (drop path, a schedule of its own)."""

    def set_progress(self, share: float) -> None:
        """Take the share of a phase's epochs that is done; called as each epoch begins."""


@runtime_checkable
class ZeroInitializing(Protocol):
    """A residual block that can begin as the identity (BigNAS)."""

    def zero_init_last(self) -> None:
        """Set the scale of its last normalisation to zero."""


@runtime_checkable
class RunningStatistics(Protocol):
    """A batch norm whose `running_mean` and `running_var` under an arch are not simply what it stores.

    Where the features in force are several parts of what is stored, they are a copy, and what is written into it is
    lost; recalibration reads and writes them here.
    """

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance of the features in force, which the caller does not change."""
        ...

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Store the running mean and variance of the features in force; those of the others stay."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A live task, or a backbone, that says when its files are others; a run that was begun with others is refused."""

    fingerprint: str


@runtime_checkable
class Preprocessing(Protocol):
    """A live task that says how inputs are prepared, plain data for the cost card of a network."""

    preprocessing: Mapping[str, Json]


@runtime_checkable
class Collating(Protocol):
    """A data set that makes batches itself, where torch's default would not do."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples."""


@runtime_checkable
class InMemory(Protocol):
    """A data set whose samples, not augmented, may be there as tensors already."""

    def tensors(self) -> tuple[Tensor, ...] | None:
        """Return what its batches are made of, each with all samples in order; None if they are not there."""


# -- how it is trained ------------------------------------------------------------------------------------------------


@frozen
class MutatorContext:
    """What a sampler draws from; `space` may be narrower than the supernet's.

    cost: of the codes of this space
    paths: how many archs the phase wants at each step; None leaves it to the mutator's options
    """

    space: SearchSpace
    cost: Cost
    rng: np.random.Generator
    paths: int | None = None


class Sampler(Protocol):
    """Draws the archs of each training step. It may be `Stateful`; what its generator draws is kept anyway."""

    def sample(self, score: Callable[[Sequence[Arch]], Sequence[float]]) -> list[Arch]:
        """Return the archs of one step.

        score: gives their losses on this step's batch, without gradient (on its first part, where `train.accumulate`
            cuts it)
        """


@runtime_checkable
class Mutator(Protocol):
    """Options of how archs are drawn."""

    def start(self, context: MutatorContext) -> Sampler:
        """Return the sampler of one phase of a training. Raises UserError if it cannot draw what the phase wants."""


@frozen
class Phase:
    """A part of a training with a space and settings of its own.

    begin: runs once before its first step; it may change the weights (sort channels), so a moving average starts anew
    paths: how many archs the mutator draws at each step; None leaves it to the mutator's options
    """

    space: SearchSpace
    train: Train
    begin: Callable[[], None] | None = None
    paths: int | None = None


@frozen
class AlgorithmContext:
    """What a trainer works with.

    supernet: on `device` already
    distiller: None unless the spec has one; a trainer that uses it keeps it as `distiller`
    teacher: a fixed network that teaches, None unless the spec has one (`corenas.teaching.lesson`)
    pretrained: whether the supernet's weights come from a file, and are not to be drawn or set anew
    """

    supernet: nn.Module
    space: SearchSpace
    cost: Cost
    task: LiveTask
    train: Train
    device: torch.device
    distiller: LiveDistiller | None = None
    teacher: Teacher | None = None
    pretrained: bool = False


class Step(Protocol):
    """One step of a training as its loop lends it to `train_step`.

    archs: what the sampler drew; none where the spec has no mutator
    lr: the learning rate in force
    index: steps taken before this one
    part: which part of the batch this is, where `train.accumulate` cuts it; `train_step` is called for each
    rng: a generator of this step alone, the same in all processes; torch's global one is seeded for the step as well
    """

    archs: Sequence[Arch]
    optimizer: torch.optim.Optimizer
    lr: float
    index: int
    part: int
    rng: np.random.Generator

    def backward(self, loss: Tensor) -> Tensor:
        """Add a loss's gradients to those of the step and free its graph. Returns the loss, detached."""

    def more(self, split: str, augmented: bool = False) -> Any:
        """Return the next batch of another stream, "valid" for instance, in an order of its own.

        With several processes each has a part of it. Each call gives one, also for each of the parts that
        `train.accumulate` cuts a batch into.
        """

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors averaged over processes: for gradients of parameters that are the algorithm's own."""


@runtime_checkable
class Stateful(Protocol):
    """Something with a state of its own that belongs into a checkpoint; a trainer or a sampler may be.

    The state is tensors and plain data: weights of its own, a board of archs, a teacher. It has to be the same in all
    processes.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from a state."""


class Trainer(Protocol):
    """A live algorithm. The loop clears gradients before `train_step` and steps the optimizer after it.

    It may be `Stateful` and `Deriving`. Optional: `distiller`, the context's, where it has one: what a distiller learns
    itself is then trained and kept beside the supernet.
    """

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase, or several one after the other."""

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Train one step: call `step.backward` once per path, so that one path's activations live at a time.

        Returns figures to show, "loss" among them, detached and still on the device.
        """
        ...


@runtime_checkable
class Deriving(Protocol):
    """A trainer of a method that finds its arch itself (DARTS, Cream)."""

    def derive(self) -> Mapping[str, Any]:
        """Return the choices of the arch; called after training."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """Options of how a supernet is trained.

    stages: which of "train", "search", "derive", "retrain" a run has, in order; "derive" wants a
        `Deriving` trainer; without "train" no supernet is ever allocated, and `start` is not called
    needs: which tables of a spec it cannot do without, of "mutator", "searcher", "distiller"
    Optional: `uses`, which it can do without but looks at, of "distiller" and "teacher" (others are refused);
    `defaults`, table -> name of the component that stands in where a spec leaves out what it needs. It may be
    `Checking` and `Selective`.
    """

    @property
    def stages(self) -> Sequence[str]:
        """The stages in order."""

    @property
    def needs(self) -> Sequence[str]:
        """The tables."""

    def start(self, context: AlgorithmContext) -> Trainer:
        """Return the trainer of a supernet."""


@runtime_checkable
class Checking(Protocol):
    """An algorithm that says what it cannot train before there are weights, so that `corenas check` finds it."""

    def check(self, context: AlgorithmContext) -> Sequence[Phase] | None:
        """Raise UserError for a network, a space or settings that `start`, or a step, would refuse.

        context: its supernet may be on the meta device, its task without data; it has no distiller and no teacher
        Returns the phases that its trainer will have, in each of which a mutator is tried; None for one, of the whole
        space.
        """


@runtime_checkable
class Selective(Protocol):
    """An algorithm that not any archs can train together, so that `corenas check` finds a mutator that draws others."""

    def check_archs(self, archs: Sequence[Arch], space: SearchSpace) -> None:
        """Raise UserError for archs of a step that `train_step` would refuse.

        space: the supernet's
        """


@frozen
class Signals:
    """What one forward of a model shows of itself, for a distiller to compare.

    outputs: as the task's `loss` takes them
    logits: as the task has them, or None
    features: the outputs of the tapped segments
    """

    outputs: Any
    logits: Tensor | None
    features: Sequence[Tensor] = ()

    @property
    def answers(self) -> Tensor | None:
        """The outputs where they are one tensor, whatever it means, else the logits."""
        return self.outputs if hasattr(self.outputs, "shape") else self.logits


Tap: TypeAlias = int | str
"""A part of a network: the number of one of its backbone's `segments`, -1 for the last, or the name of a module."""


class LiveDistiller(Protocol):
    """Compares a student with a teacher, both as `corenas.supernet.observe` sees them.

    taps: which parts of the student, and of the teacher, it wants the outputs of
    Optional: `teacher_taps`, those of a fixed teacher, whose parts have other names. A distiller that learns something
    itself (a projection) is a torch module: its parameters are trained with the supernet's, by the same optimizer, kept
    in the checkpoint, and are no part of any network.
    """

    @property
    def taps(self) -> Sequence[Tap]:
        """The parts."""

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return how far the student is from the teacher: a scalar. No gradient reaches the teacher."""


class Teacher(Protocol):
    """A fixed network that teaches.

    labels: weight of the loss on the labels beside the distiller's
    """

    @property
    def labels(self) -> float:
        """The weight."""

    def __call__(self, batch: Any) -> Signals:
        """Return what it shows of a batch, without gradient."""


@frozen
class DistillerContext:
    """What a distiller is started with.

    student: the network whose paths learn, on `device`, under its largest arch
    teacher: the fixed network that teaches; None where a path of the student does
    """

    task: LiveTask
    student: nn.Module
    device: torch.device
    teacher: nn.Module | None = None


@runtime_checkable
class Distiller(Protocol):
    """Options of what a student learns from a teacher."""

    def start(self, context: DistillerContext) -> LiveDistiller:
        """Return the distiller of a training.

        It, or its first loss, raises UserError if nothing can be compared: tried before a run on a model that may be on
        the meta device.
        """


# -- how it is searched -----------------------------------------------------------------------------------------------


class Region(Protocol):
    """What draws archs: a space, or the part of one that obeys constraints. Many at a time they are codes.

    Codes are a matrix (archs, variables) of the index of each choice, of a `continuous` variable where it lies between
    its bounds, 0..1; `encode` and `decode` go there and back.
    """

    variables: tuple[Variable, ...]

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return the codes of n archs at random."""

    def encode(self, archs: Iterable[Mapping[str, Any]]) -> Codes:
        """Return the codes of archs."""

    def decode(self, codes: Codes) -> list[Arch]:
        """Return the archs of codes."""

    def admit(self, codes: Codes) -> Codes:
        """Return those of some archs that belong to it, canonical: for a searcher's own moves."""

    def sample(self, rng: np.random.Generator) -> Arch:
        """Return an arch at random."""

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """Return the arch with each variable drawn again with probability `prob`."""

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Return a mutant of each arch."""

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """Return an arch with each variable from one of two parents."""

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Return a child of each pair of archs."""


@frozen
class Problem:
    """What a searcher is asked.

    space: draws, mutates and crosses archs that obey the cheap constraints
    objectives: ranks trials: `best` of some, or a `score` of one, of which more is better, whatever is searched for
    budget: how many trials there will be, those of a lower fidelity counted as the share that they are
    cost: codes of the space -> a column of whole numbers for each of flops, params and activations; None where archs
        are none of a network
    constraints: what makes a trial infeasible: those that the space obeys, and those on what is measured
    known: what earlier searches of the run have measured, under other constraints
    """

    space: Region
    objectives: Objectives
    budget: int
    cost: Callable[[Codes], Mapping[str, np.ndarray]] | None = None
    constraints: Sequence[Constraint] = ()
    known: Sequence[Trial] = ()


@frozen
class Proposal:
    """An arch to be measured, with what there is to say of it.

    fidelity: share of the whole effort, above 0 and up to 1 (successive halving)
    extra: facts that its trial keeps, plain data: what a predictor expected, a sweep's inclusion probability
    """

    arch: Arch
    fidelity: float = 1.0
    extra: Mapping[str, Json] = field(factory=dict)


class Search(Protocol):
    """A live searcher."""

    def ask(self, n: int) -> Sequence[Arch | Proposal]:
        """Return up to n archs to be measured next, each once (`corenas.space.unseen`); none ends the search.

        Archs that the run knows already come back at once.
        """

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in the results of the last `ask`, in its order, in all states."""

    def state_dict(self) -> dict[str, Json]:
        """Return everything that it needs to go on, as plain data."""

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state."""


@runtime_checkable
class Searcher(Protocol):
    """Options of a search method."""

    def start(self, problem: Problem, rng: np.random.Generator) -> Search:
        """Return the search for one problem."""


@frozen
class Measured:
    """What an evaluator gives for an arch where it has more to say than metrics.

    extra: facts that the trial keeps, plain data: the device, the spread of a timing
    """

    metrics: Mapping[str, float]
    extra: Mapping[str, Json] = field(factory=dict)


@frozen
class Failure:
    """What an evaluator gives for an arch that it could not measure, with the reason."""

    reason: str


@frozen
class Stopped:
    """What an evaluator gives for an arch that it has stopped measuring, since it has lost, with the reason.

    extra: facts that the trial keeps, plain data
    """

    reason: str
    extra: Mapping[str, Json] = field(factory=dict)


@frozen
class Rival:
    """Whom an arch races against.

    metric: of which more wins
    arch: the other one, None where there are too few trials yet
    error: chance that is taken of stopping an arch that is as good
    """

    metric: str
    arch: Arch | None
    error: float


class Evaluation(Protocol):
    """Runs subnets of a trained supernet on a split of the data, their batch norm recalibrated."""

    def calibrated(self, arch: Arch) -> AbstractContextManager[nn.Module]:
        """Return the supernet under an arch, in evaluation mode with its statistics recomputed, for a while."""

    def split(self, name: str, share: float = 1.0) -> Iterable[Any]:
        """Return the batches of a split, or of a share of it, always the same."""

    def __call__(self, arch: Arch, split: str = "valid", share: float = 1.0) -> Mapping[str, float]:
        """Return an arch's metrics on a split, or on a share of it."""

    def raced(
        self, arch: Arch, rival: Rival, split: str = "valid", share: float = 1.0
    ) -> Mapping[str, float] | Stopped:
        """Return the same, images in an order at random, or that it was stopped. Raises UserError if nothing races."""


@frozen
class EvaluatorContext:
    """What an evaluator measures with. `supernet` and `evaluation` are None where no supernet was trained.

    subnet: arch -> this one network, freshly initialised, without ever allocating a supernet (Zen-NAS)
    alone: (arch, fidelity) -> the network of an arch trained from scratch as the spec says, for the first share of its
        epochs, gone on from a lower one where that was trained before; choices of variables named `spec:…` override the
        spec; with a third number, `again`, another training that differs in its seed alone
    rng: arch -> a generator for this arch; where one arch is measured at a time, torch's global one is seeded for it as
        well, so that what is measured hangs neither on the order of archs nor on the process that measures
    """

    space: SearchSpace
    cost: Cost
    task: LiveTask
    device: torch.device
    supernet: nn.Module | None
    evaluation: Evaluation | None
    subnet: Callable[[Arch], nn.Module]
    alone: Callable[..., nn.Module]
    rng: Callable[[Arch], np.random.Generator]


class LiveEvaluator(Protocol):
    """Measures archs, several at a time."""

    def __call__(
        self, archs: Sequence[Arch], fidelity: float
    ) -> Sequence[Mapping[str, float] | Measured | Failure | Stopped]:
        """Return metrics of archs, one result each, in order; `fidelity` is the share of the whole effort.

        What an arch is given must not hang on which others are measured with it. If a call for several raises, each is
        measured again by itself.
        """


@runtime_checkable
class Racer(Protocol):
    """A live evaluator that stops measuring archs that have lost."""

    def against(self, rival: Rival) -> LiveEvaluator:
        """Return what measures archs that race against this one."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Options of something that measures archs.

    cheap: whether thousands a second are no trouble; cheap ones run first, in one call for all archs of an `ask`, so
        that constraints spare the others
    Optional: `batch`, how many archs a costly one wants at once, since it can share work among them (1 unless it says
    so); `exclusive`, whether it wants the machine for itself (timing): then nothing else is measured meanwhile,
    whatever the executor; `alone`, whether it trains archs alone, by the context's `alone` (left out, it may where no
    supernet is trained): where nothing does, variables named `spec:…` and `[train]` are refused; `races`, whether what
        it starts is a `Racer`
    """

    cheap: ClassVar[bool]

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metrics it gives for a task."""

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return a function from archs to their metrics."""


@runtime_checkable
class Batched(Protocol):
    """An evaluator that measures several archs at once in less time than one by one."""

    batch: int


@runtime_checkable
class Exclusive(Protocol):
    """An evaluator that says whether it wants the machine for itself."""

    exclusive: bool


# -- where it runs, what comes out ------------------------------------------------------------------------------------


@runtime_checkable
class Executor(Protocol):
    """Options of where trials run. What is submitted can be pickled, and sets a worker up the first time it runs there.

    Workers see the run directory, and have the same plugins installed.
    """

    def start(self) -> futures.Executor:
        """Return the workers."""


@frozen
class ExportContext:
    """What a network is written with.

    example: one input of the network, as the task has it (`LiveTask.example`)
    title: a line that says what network this is
    inputs: n -> batches of inputs of n training samples, of all where there are fewer: always the same, not augmented,
        on the CPU. Calibration looks at them. None come where no data was read
    """

    example: Any
    title: str = ""
    inputs: Callable[[int], Iterable[Any]] = lambda n: ()


@runtime_checkable
class Exporter(Protocol):
    """Options of a file format for networks."""

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Write a plain network, on the CPU and in evaluation mode, into a folder; returns the file.

        Raises UserError for a network that the format cannot hold, OSError where nothing can be written there (a full
        disk, no such folder), which is told as such: `torch.save` raises it if it is given a file that is open.
        """


@frozen
class StageStarted:
    """A stage of a run begins; `total` counts its units ("steps", "trials")."""

    stage: str
    total: int
    unit: str
    done: int = 0


@frozen
class Progress:
    """A stage has come this far; `figures` are what to show beside it.

    point: whether this is a point of the stage's curve, the end of an epoch for instance, not just a sign of life
    """

    stage: str
    done: int
    figures: Mapping[str, float] = field(factory=dict)
    point: bool = False


@frozen
class StageDone:
    """A stage has ended."""

    stage: str
    seconds: float
    figures: Mapping[str, float] = field(factory=dict)


@frozen
class TrialDone:
    """A trial was measured and stored."""

    trial: Trial


@frozen
class Note:
    """Something a person should know; not an error."""

    text: str


@frozen
class RunStarted:
    """A run begins, or goes on."""

    name: str
    folder: Path
    resumed: bool


@frozen
class RunDone:
    """A run has ended.

    result: what `corenas run --json` prints
    splits, metrics: of its task, to say on what its figures were measured and what they mean
    """

    folder: Path
    result: Mapping[str, Json] = field(factory=dict)
    splits: Mapping[str, int] = field(factory=dict)
    metrics: Mapping[str, Metric] = field(factory=dict)


Event: TypeAlias = RunStarted | StageStarted | Progress | StageDone | TrialDone | Note | RunDone
Emit: TypeAlias = Callable[[Event], None]

# -- what is said of any options -------------------------------------------------------------------------------------


@frozen
class Surroundings:
    """What there is in a run around a component, some of whose options may have nothing to do there.

    task: with or without data
    network: with the backbone and its head, maybe without weights; None where there is none
    trials: archs that a search measures, 0 where there is none
    """

    space: SearchSpace
    task: LiveTask
    network: nn.Module | None = None
    trials: int = 0

    def idle_searcher(self, at_random: int | None) -> dict[str, str]:
        """Return that a searcher learns nothing where so many archs at random, which it begins with, are all trials."""
        if at_random is None or not 0 < self.trials <= at_random:
            return {}
        return {"type": f"{at_random:,} archs at random are all {self.trials:,} trials"}


@runtime_checkable
class PartlyIdle(Protocol):
    """Options of any kind that say which of them do nothing; `corenas check` and the run tell it."""

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return option -> why it does nothing, beside the other options or in such a run.

        Of an option at its default nothing is told. "type" stands for the component itself.
        """


# -- all kinds of components ------------------------------------------------------------------------------------------

COMPONENTS: Mapping[str, Any] = {
    "mutators": Mutator,
    "algorithms": Algorithm,
    "distillers": Distiller,
    "searchers": Searcher,
    "evaluators": Evaluator,
    "backbones": Backbone,
    "tasks": Task,
    "executors": Executor,
    "exporters": Exporter,
}
"""The kinds that a spec names, offered by hooks `corenas_<kind>`, and what their options fulfil."""


def members_of(contract: Any) -> list[str]:
    """Return the names of what an object has to have that fulfils a contract."""
    return sorted(name for name in {**vars(contract), **contract.__annotations__} if not name.startswith("_"))
