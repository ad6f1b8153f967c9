"""The training loop: what a step amounts to, and that an interrupted training ends as if it had not been."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Backbone, Mutator, Task, Trainer, make_space

from corenas.checkpoint import load_weights
from corenas.contracts import Phase, Progress, StageDone, StageStarted
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.optim import Schedule
from corenas.settings import Train
from corenas.space import Arch
from corenas.supernet import build_supernet, supernet_cost
from corenas.testing.small import Paths
from corenas.train import LoopStep, _decay, run_training

pytestmark = pytest.mark.filterwarnings("error")
SPACE = make_space()
SGD = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def settings(**changes):
    return Train(**{"epochs": 3, "batch_size": 16, "optimizer": SGD, "schedule": Schedule("constant")} | changes)


def setup(*phases, task=None, norm=True, space=SPACE, trainer=Trainer):
    """A model, its trainer, and a function that trains it."""
    task = task or Task()
    torch.manual_seed(0)
    model = build_supernet(Backbone(norm), space, task)
    cost = supernet_cost(model, space, task)
    made = [Phase(*p) if isinstance(p, tuple) else p if isinstance(p, Phase) else Phase(space, p) for p in phases]
    live = trainer(model, task, made)

    def go(mutator=None, **more):
        return run_training(live, model, task, mutator or Mutator(), cost, seed=5, **more)

    return model, live, go


def same(first, second):
    """Whether two states hold the same bits."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def batch_of(task=None, n=32):
    return tuple(tensor[:n] for tensor in (task or Task()).data["train"])


def test_the_loss_goes_down_and_everything_is_told():
    events = []
    _, live, go = setup(settings(epochs=6))
    go(emit=events.append)
    assert isinstance(events[0], StageStarted)
    assert (events[0].total, events[0].unit, events[0].done) == (36, "steps", 0)
    assert isinstance(events[-1], StageDone)
    shown = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in shown] == sorted(event.done for event in shown)
    assert shown[-1].done == 36
    assert shown[-1].figures["loss"] < 0.5 < shown[0].figures["loss"]
    assert {"epoch", "loss", "lr"} <= shown[-1].figures.keys()
    assert [index for index, _, _ in live.seen] == [*range(36)]


def test_weights_of_images_go_channels_last_and_those_of_other_ranks_stay():
    model, _, go = setup(settings(epochs=1))
    model.video = nn.Conv3d(3, 4, 3)
    go()
    assert model.backbone.stage.blocks[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.video.weight.is_contiguous()


def test_modules_are_told_as_each_epoch_begins_how_far_the_training_is():
    model, _, go = setup(settings(epochs=4))
    told = []
    model.backbone.set_progress = told.append
    go()
    assert told == [0, 0.25, 0.5, 0.75]


def test_batch_norm_of_a_single_value_is_a_mistake_in_the_spec():
    class OnePixel(Trainer):
        def train_step(self, batch, step):
            return super().train_step((batch[0][:1, :, :1, :1], batch[1][:1]), step)

    _, _, go = setup(settings(), trainer=OnePixel)
    with pytest.raises(UserError, match="one value of each channel") as caught:
        go()
    assert caught.value.faults[0].dotted == "train.batch_size"


def test_a_step_is_torchs_step():
    """One path without batch norm: the same arithmetic by hand."""
    task = Task()
    model, live, go = setup(settings(epochs=1, batch_size=96, optimizer={"type": "SGD", "lr": 0.5}), norm=False)
    plain = copy.deepcopy(model)
    task.dataset = lambda split, augmented: Task().dataset(split, False)
    live.task.dataset = task.dataset
    go()
    arch = live.seen[0][2][0]
    images, labels = task.data["train"]
    with apply(plain, arch):
        F.cross_entropy(plain(images), labels).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        wanted = theirs if theirs.grad is None else theirs - 0.5 * theirs.grad
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulated_parts_amount_to_the_whole_batch(parts):
    whole, _, go = setup(settings(epochs=1), norm=False)
    go(Mutator(2))
    cut, live, go = setup(settings(epochs=1, accumulate=parts), norm=False)
    go(Mutator(2))
    assert len(live.seen) == 6 * parts
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("phases", [
    [settings(ema=0.9)],
    [settings(ema=0.9, epochs=2), settings(ema=0.9, epochs=1)],  # goes on
    [settings(ema=0.9, epochs=2), Phase(SPACE, settings(ema=0.9, epochs=1), lambda: None)],  # starts anew
], ids=["one", "two", "anew"])  # fmt: skip
def test_the_moving_average_is_the_one_written_by_hand(phases):
    kept = []

    class Watched(Trainer):
        def train_step(self, batch, step):
            kept.append([p.detach().clone() for p in self.model.parameters()])
            return super().train_step(batch, step)

    model, _, go = setup(*phases, trainer=Watched)
    average = go()
    kept.append([p.detach().clone() for p in model.parameters()])
    assert len(kept) == 19
    first = 12 if isinstance(phases[-1], Phase) else 0
    wanted = kept[first]
    for n, step in enumerate(kept[first + 1 :], 1):
        decay = min(0.9, 1 - n ** (-2 / 3))
        wanted = [decay * old + (1 - decay) * new for old, new in zip(wanted, step, strict=True)]
    assert average is not model
    for ours, theirs in zip(average.parameters(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_young_moving_average_forgets_as_timm_documents_it():
    # timm's ModelEma: "gamma=1, power=2/3 … (reaches decay factor 0.999 at 31.6K steps, 0.9999 at 1M steps)"
    assert [round(_decay(1.0, steps), 4) for steps in (0, 31_600, 1_000_000)] == [0, 0.999, 0.9999]
    assert _decay(0.98, 10_000) == 0.98


class Clipped(Trainer):
    """Gradients a thousand times too large."""

    def train_step(self, batch, step):
        losses = [step.backward(1000 * self.task.loss(self.task.forward(self.model, batch), batch)) for _ in step.archs]
        return {"loss": torch.stack(losses).mean()}


def test_gradients_are_clipped_by_norm_and_by_value():
    plain = {"type": "SGD", "lr": 1.0}
    model, _, go = setup(settings(epochs=1, batch_size=96, optimizer=plain, clip_norm=0.5), norm=False, trainer=Clipped)
    before = [p.detach().clone() for p in model.parameters()]
    go()
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)
    model, _, go = setup(
        settings(epochs=1, batch_size=96, optimizer=plain, clip_value=0.01), norm=False, trainer=Clipped
    )
    go()
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_trains_and_keeps_weights_in_full():
    seen = []

    class Watched(Trainer):
        def train_step(self, batch, step):
            seen.append(self.model(batch[0]).dtype)
            return super().train_step(batch, step)

    events = []
    model, _, go = setup(settings(epochs=6, precision="bfloat16"), trainer=Watched)
    go(Mutator(2, scored=True), emit=events.append)
    assert {*seen} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert events[-1].figures["loss"] < 0.7


def test_a_look_without_gradient_does_not_take_the_gradient_of_the_next_under_mixed_precision():
    class Teacher(Trainer):
        def train_step(self, batch, step):
            with torch.no_grad():
                self.task.forward(self.model, batch)
            found = super().train_step(batch, step)
            assert all(p.grad is not None for p in self.model.head.parameters())
            return found

    _, _, go = setup(settings(epochs=1, precision="bfloat16"), trainer=Teacher)
    go()


def test_scoring_leaves_no_trace():
    space = make_space()
    losses = []

    class Scoring(Mutator):
        def sample(self, score):
            (draw,) = super().sample(score)
            losses.append(score([draw, draw, space.smallest()]))
            return [draw]

    # Candidates are compared without dropout, as in AttentiveNAS's code: chance would choose among them.
    plain, _, go = setup(settings(), task=Task(dropout=0.5))
    go()
    scored, _, go = setup(settings(), task=Task(dropout=0.5))
    go(Scoring())
    assert same(plain.state_dict(), scored.state_dict())
    assert all(len(found) == 3 and found[0] == found[1] and isinstance(found[0], float) for found in losses)


def test_scores_are_the_losses_of_the_step():
    found = []

    class Scoring(Mutator):
        def sample(self, score):
            draw = super().sample(score)
            found.append(score(draw))
            return draw

    class Watched(Trainer):
        def train_step(self, batch, step):
            shown = super().train_step(batch, step)
            assert found[-1][0] == pytest.approx(float(shown["loss"]), rel=1e-6)
            return shown

    setup(settings(epochs=2), trainer=Watched)[2](Scoring())
    assert len(found) == 12


def test_idle_candidates_keep_no_gradient_and_their_weights():
    space = make_space(op=["skip", "conv"]).fix({"op": "skip"})
    model, _, go = setup((space, settings()))
    idle = model.backbone.op.candidates["conv"]
    before = copy.deepcopy(idle.state_dict())
    go()
    assert all(p.grad is None for p in idle.parameters())
    assert same(idle.state_dict(), before)
    assert all(p.grad is not None for p in model.head.parameters())


def test_training_leaves_torchs_generator_as_it_was():
    phase = settings(epochs=1, ema=0.9, accumulate=2)
    begun = []
    _, _, go = setup((SPACE, phase, lambda: begun.append(torch.rand(1))), task=Task(dropout=0.3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    go(Mutator(2, scored=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert begun


def test_what_begins_a_phase_draws_by_the_seed():
    drawn = []
    for start in (1, 2):
        _, _, go = setup((SPACE, settings(epochs=1), lambda: drawn.append(float(torch.rand(1)))))
        torch.manual_seed(start)
        go()
    assert drawn[0] == drawn[1]


def test_phases_have_a_space_and_settings_of_their_own():
    largest = SPACE.fix({"width": 8, "depth": 3, "op": "conv", "blocks.*.kernel": 3})
    begun = []
    slow = settings(epochs=1, batch_size=32, optimizer=SGD | {"lr": 0.01})
    _, live, go = setup((largest, settings(epochs=2)), (SPACE, slow, lambda: begun.append(len(live.seen))))
    events = []
    go(emit=events.append)
    assert events[0].total == 2 * 6 + 3
    assert begun == [12]
    assert [index for index, _, _ in live.seen] == [*range(15)]
    assert [lr for _, lr, _ in live.seen] == [0.1] * 12 + [0.01] * 3
    assert {archs[0] for _, _, archs in live.seen[:12]} == {SPACE.largest()}
    assert len({archs[0] for _, _, archs in live.seen[12:]}) > 1


# -- interruptions ----------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


def stopping(at):
    """An event listener that raises at the n-th sign of progress at the end of an epoch."""
    seen = []

    def emit(event):
        if isinstance(event, Progress) and event.point:
            seen.append(event.done)
            if len(seen) > at:
                raise Stop

    return emit


class Streaming(Trainer):
    """Also reads another stream, as DARTS does."""

    def train_step(self, batch, step):
        figures = super().train_step(batch, step)
        other = step.more("valid")
        with apply(self.model, SPACE.largest()):
            step.backward(0.1 * self.task.loss(self.task.forward(self.model, other), other))
        return figures


def everything(path):
    saved = torch.load(path, weights_only=True)
    return {key: saved[key] for key in sorted(saved)}


@pytest.mark.parametrize(("every", "stop"), [*((1, stop) for stop in range(5)), (2, 0), (2, 1), (2, 3)])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, stop, every):
    first = settings(epochs=3, ema=0.9, schedule=Schedule("cosine", warmup=0.5), checkpoint_every=every, accumulate=2)
    second = settings(epochs=2, ema=0.8, optimizer={"type": "AdamW", "lr": 0.01}, checkpoint_every=every)
    narrow = SPACE.narrow({"width": [4, 8]})

    def fresh():
        return setup((narrow, first), (SPACE, second, begin), task=Task(dropout=0.3), trainer=Streaming)

    def begin():
        with torch.no_grad():
            for p in models[-1].head.parameters():
                p.add_(0.1 * torch.randn(p.shape))

    models = []
    mutator = Mutator(2, scored=True)
    model, _, go = fresh()
    models.append(model)
    whole = go(mutator, checkpoint=tmp_path / "whole.pt")
    path = tmp_path / "sub" / "cut.pt"
    model, _, go = fresh()
    models.append(model)
    with pytest.raises(Stop):
        go(mutator, checkpoint=path, emit=stopping(stop))
    torch.manual_seed(stop)  # another process has another state
    model, _, go = fresh()
    models.append(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        if not path.exists():
            for p in model.parameters():
                p.sub_(1.0)
            model, _, go = fresh()
            models[-1] = model
    events = []
    resumed = go(mutator, checkpoint=path, emit=events.append)
    assert same(everything(path), everything(tmp_path / "whole.pt"))
    assert same(models[-1].state_dict(), models[0].state_dict())
    assert same(resumed.state_dict(), whole.state_dict())
    # A checkpoint is there before its epoch is told of, and always at the end of a phase.
    done, before, epochs = (stop + 1, 0, 3) if stop < 3 else (stop - 2, 3, 2)
    assert events[0].done == (before + (done if done == epochs else done // every * every)) * 6
    assert events[0].total == 30
    assert not path.with_name("cut.pt.part").exists()


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_long_epoch_goes_on_in_its_middle(tmp_path, monkeypatch, stop):
    monkeypatch.setattr("corenas.train.CHECKPOINT_EVERY_S", 0.0)

    class Stopping(Streaming):
        def train_step(self, batch, step):
            if step.index == stop and step.part == 0:
                raise Stop
            return super().train_step(batch, step)

    def fresh(trainer):
        return setup(settings(epochs=2, ema=0.9, accumulate=2), task=Task(dropout=0.3), trainer=trainer)[2]

    fresh(Streaming)(checkpoint=tmp_path / "whole.pt")
    with pytest.raises(Stop):
        fresh(Stopping)(checkpoint=tmp_path / "cut.pt")
    events = []
    fresh(Streaming)(checkpoint=tmp_path / "cut.pt", emit=events.append)
    assert events[0].done == stop
    assert same(everything(tmp_path / "cut.pt"), everything(tmp_path / "whole.pt"))


def test_half_a_training_gives_no_weights_and_the_end_of_an_epoch_is_told_once_more(tmp_path):
    path, points = tmp_path / "c.pt", []

    def note(event):
        if isinstance(event, Progress) and event.point:
            points.append(event)
            if len(points) == 1:
                raise Stop  # killed after the checkpoint, before anybody heard

    model, _, go = setup(settings(epochs=2))
    with pytest.raises(Stop):
        go(checkpoint=path, emit=note)
    with pytest.raises(UserError, match="has not come to its end"):
        load_weights(model, path)
    setup(settings(epochs=2))[2](checkpoint=path, emit=note)
    assert points[0] == points[1]
    assert [point.figures["epoch"] for point in points] == [1, 1, 2]
    load_weights(model, path)


def test_another_stream_of_the_training_data_has_an_order_of_its_own_and_may_be_augmented():
    same_images, kinds = [], []

    class Reading(Trainer):
        def train_step(self, batch, step):
            same_images.append(torch.equal(step.more("train")[1], batch[1]))
            kinds.append(torch.equal(step.more("valid")[0], step.more("valid", augmented=True)[0]))
            with pytest.raises(UserError, match="test data"):
                step.more("test")
            return super().train_step(batch, step)

    setup(settings(epochs=1), trainer=Reading)[2]()
    assert not any(same_images)
    assert not any(kinds)


class Alien(Trainer):
    """Keeps an arch where plain data belongs."""

    def state_dict(self):
        return {"board": [SPACE.default()]}

    def load_state_dict(self, state):
        pass


def test_a_state_that_could_not_be_read_again_is_refused_before_anything_is_lost(tmp_path):
    setup(settings(epochs=1))[2](checkpoint=tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(UserError, match=r"holds corenas\.space\.Arch"):
        setup(settings(), trainer=Alien)[2](checkpoint=tmp_path / "d.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    assert (tmp_path / "c.pt").read_bytes() == before


class Half(Trainer):
    def state_dict(self):
        return {}


class Mute(Trainer):
    def train_step(self, batch, step):
        super().train_step(batch, step)


class Floats(Trainer):
    def train_step(self, batch, step):
        return {name: float(figure) for name, figure in super().train_step(batch, step).items()}


def test_what_the_author_of_an_algorithm_forgets_is_told():
    with pytest.raises(UserError, match="expected both or none"):
        setup(settings(), trainer=Half)[2]()
    with pytest.raises(UserError, match="train_step gave None"):
        setup(settings(), trainer=Mute)[2]()
    with pytest.raises(UserError, match="no phases"):
        setup()[2]()
    events = []
    setup(settings(epochs=1), trainer=Floats)[2](emit=events.append)
    assert events[-1].figures["loss"] > 0


@pytest.mark.parametrize(("drawn", "message"), [
    ({}, "no list of archs"), ([], "no list of archs"), (None, "no list of archs"), ([{"op": "skip"}], "no list"),
    ([Arch({"op": "skip"})], "KeyError"), ([Arch({**SPACE.default(), "width": 5})], "KeyError: 5"),
])  # fmt: skip
def test_what_a_sampler_draws_has_to_be_archs_of_its_space(drawn, message):
    class Wrong:
        def start(self, context):
            self.sample = lambda score: drawn
            return self

    with pytest.raises(UserError, match=message) as caught:
        setup(settings())[2](Wrong())
    assert "mutator " in str(caught.value)


def test_a_phase_says_how_many_archs_its_steps_have():
    phases = [Phase(SPACE, settings(epochs=1), paths=paths) for paths in (1, 3)]
    _, live, go = setup(settings())
    live.phases = phases
    go(Paths(2))
    assert [*dict.fromkeys(len(archs) for *_, archs in live.seen)] == [1, 3]
    with pytest.raises(UserError, match="draws 2 archs a step where the algorithm wants 1"):
        go(Mutator(2))


def test_a_training_that_is_done_trains_no_more(tmp_path):
    model, _, go = setup(settings())
    go(checkpoint=tmp_path / "c.pt")
    again, live, go = setup(settings())
    go(checkpoint=tmp_path / "c.pt")
    assert live.seen == []
    assert same(again.state_dict(), model.state_dict())


def test_a_training_that_ended_early_goes_on_to_the_same_bits(tmp_path):
    changes = {"epochs": 3, "ema": 0.9, "schedule": Schedule("cosine"), "checkpoint_every": 2}
    whole = setup(settings(**changes))[2](checkpoint=tmp_path / "whole.pt")
    for until in (1, 2):
        early = setup(settings(**changes))[2](checkpoint=tmp_path / "cut.pt", until=until)
        assert torch.load(tmp_path / "cut.pt", weights_only=True)["place"][1:3] == (until, 0)
        assert not torch.load(tmp_path / "cut.pt", weights_only=True)["done"]
        assert not all(torch.equal(a, b) for a, b in zip(early.parameters(), whole.parameters(), strict=True))
    last = setup(settings(**changes))[2](checkpoint=tmp_path / "cut.pt")
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), whole.parameters(), strict=True))


def test_the_weights_of_a_checkpoint_are_those_that_training_returned(tmp_path):
    for ema in (None, 0.7):
        path = tmp_path / f"{ema}.pt"
        trained = setup(settings(ema=ema))[2](checkpoint=path)
        model, _, _ = setup(settings())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        load_weights(model, path)
        assert same(model.state_dict(), trained.state_dict())
        load_weights(model, path, raw=True)
        raw = torch.load(path, weights_only=True)["model"]
        assert same(model.state_dict(), raw)
        assert same(raw, trained.state_dict()) == (ema is None)


@pytest.mark.parametrize("content", [
    None, [1, 2], {}, {"state_dict": {}}, torch.zeros(3),
    {"model": 3, "phase": 0, "epoch": 1, "index": 6, "rng": "{}", "taken": {}},
    {"model": {}, "phase": 0, "epoch": 1, "index": 6, "rng": "{}", "taken": {}},
    {"model": {}, "phase": 7, "epoch": "x", "index": None},
], ids=str)  # fmt: skip
def test_a_broken_or_foreign_checkpoint_is_a_mistake_with_its_file(tmp_path, content):
    path = tmp_path / "c.pt"
    model, _, go = setup(settings(), settings())
    if content is None:
        go(checkpoint=path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        go(checkpoint=path)
    assert caught.value.faults[0].file == str(path)
    with pytest.raises(UserError, match=r"c\.pt"):
        load_weights(model, path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    setup(settings(), settings())[2](checkpoint=tmp_path / "c.pt")
    for other in ([settings()], [settings(), settings(ema=0.5)], [settings(), settings(no_decay=())]):
        with pytest.raises(UserError, match="checkpoint"):
            setup(*other)[2](checkpoint=tmp_path / "c.pt")


def test_no_checkpoint_and_no_place_for_one_are_mistakes(tmp_path):
    model, _, go = setup(settings(epochs=1))
    with pytest.raises(UserError, match="no such checkpoint"):
        load_weights(model, tmp_path / "none.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        go(checkpoint=tmp_path / "file" / "c.pt")


def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    _, _, go = setup(settings(optimizer={"type": "SGD", "lr": 1e30}))
    with pytest.raises(UserError, match="diverged") as caught:
        go(checkpoint=tmp_path / "c.pt")
    assert "lr" in caught.value.faults[0].hint
    assert not (tmp_path / "c.pt").exists()


def test_anyones_loop_can_lend_a_step():
    model, live, _ = setup(settings())

    class Mine:
        archs, index, part, lr, rng = [SPACE.largest()], 0, 0, 0.1, None

        def backward(self, loss):
            loss.backward()
            return loss.detach()

    assert live.train_step(batch_of(), Mine())["loss"].shape == ()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    step = LoopStep([], optimizer, 4, rng=np.random.default_rng(0), share=0.5, more=lambda split: split)
    weight = nn.Parameter(torch.ones(()))
    assert float(step.backward(2 * weight)) == 2
    assert float(weight.grad) == 1.0
    assert (step.lr, step.index, step.more("valid"), step.mean([weight])) == (0.3, 4, "valid", [weight])
