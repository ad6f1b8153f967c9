import json
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Problem, Proposal
from corenas.errors import UserError
from corenas.features import Features
from corenas.objectives import Constraint, Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import evaluator_checks
from corenas.testing.searchers import additive, drive, large_space, learning_searcher_checks, simple_problem
from corenas.testing.small import make_space
from corenas.variables import Categorical
from corenas_searcher_predictor import Predicted, Predictor, Target
from corenas_searcher_predictor.regression import MODELS, Regression, agreement, held_out

SMALL = Predictor(initial=60, per_round=40, model="ridge", population=30, generations=4)


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_conforms(check):
    check(SMALL)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_predictor")


def test_features_are_one_hot_and_zero_where_a_variable_is_inactive():
    """ofa/nas/accuracy_predictor: the bits of a block that the depth skips are all zero."""
    space = SearchSpace.from_table({"depth": [1, 2], "block": {"kernel": [3, 5, 7], "op": ["a", "b"]}})
    rows = Features(space, squares=True)(space.encode([
        space.arch({"depth": 2, "blocks": [{"kernel": 3, "op": "b"}, {"kernel": 7, "op": "a"}]}),
        space.arch({"depth": 1, "blocks": [{"kernel": 5, "op": "a"}]}),
    ]))  # fmt: skip
    assert rows.tolist() == [
        [0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0],
    ]


def test_numbers_of_many_choices_are_places():
    space = SearchSpace.from_table({"resolution": {"type": "int", "low": 128, "high": 224, "step": 4}, "width": [1, 2]})
    rows = Features(space, squares=True)(space.encode([space.arch({"resolution": 152, "width": 1})]))
    assert rows.tolist() == [[1, 0.25, 0.0625, 1, 0]]


def test_agreement_is_that_of_the_textbook():
    """Kendall's tau by counting pairs; Spearman's rho by 1 - 6 sum d² / (n (n² - 1))."""
    predicted, measured = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    found = agreement(predicted, measured)
    assert found["rmse"] == pytest.approx(np.sqrt(4 / 5))
    assert found["kendall"] == pytest.approx((8 - 2) / 10)
    assert found["spearman"] == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert agreement([1.0, 1.0], [1.0, 3.0]) == {"rmse": pytest.approx(np.sqrt(2))}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_ranks_archs_that_it_has_not_seen(model):
    space = large_space()
    measure = additive(space)
    codes = space.draw(np.random.default_rng(0), 200)
    rows = Features(space, squares=True)(codes)
    gains = np.array([measure(arch).metrics["gain"] for arch in space.decode(codes)])
    told = held_out(model, rows, gains, 0)
    assert told["spearman"] > 0.6
    predict = Regression(model, rows[:150], gains[:150], 3)
    assert agreement(predict(rows[150:]), gains[150:])["kendall"] > 0.4
    assert predict(rows).tolist() == Regression(model, rows[:150], gains[:150], 3)(rows).tolist()


def test_trials_say_what_was_expected_and_how_well_the_predictor_did():
    problem, measure = simple_problem(budget=200), additive(large_space())
    search = SMALL.start(problem, np.random.default_rng(0))
    first = search.ask(100)
    assert all(proposal.extra == {} for proposal in first)
    search.tell([measure(proposal.arch) for proposal in first])
    for number in (2, 3):
        asked = search.ask(100)
        assert len(asked) == 40
        assert all(isinstance(proposal, Proposal) and proposal.extra["round"] == number for proposal in asked)
        facts = asked[0].extra
        assert {*facts} >= {"gain_predicted", "gain_rmse", "gain_kendall", "gain_spearman"}
        assert facts["gain_spearman"] > 0.5
        assert ("gain_last_round_rmse" in facts) == (number == 3)
        trials = [measure(proposal.arch) for proposal in asked]
        predicted = [proposal.extra["gain_predicted"] for proposal in asked]
        gains = [trial.metrics["gain"] for trial in trials]
        if number == 2:
            expected = np.sqrt(np.mean((np.array(predicted) - gains) ** 2))
        else:
            assert facts["gain_last_round_rmse"] == pytest.approx(expected)  # of the round before
        search.tell(trials)


def test_a_round_waits_until_all_of_it_is_told_and_resumes_in_its_midst():
    problem, measure = simple_problem(), additive(large_space())
    first, second = (SMALL.start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=3)
    asked = [*first.ask(25), *first.ask(25)]
    assert len(asked) == 40
    assert [*first.ask(1)] == []
    first.tell([measure(proposal.arch) for proposal in asked[:7]])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        assert [*search.ask(1)] == []
        search.tell([measure(proposal.arch) for proposal in asked[7:]])
    assert drive(first, problem, measure, rounds=4) == drive(second, problem, measure, rounds=4)


def cost(codes):
    return {"flops": codes.sum(axis=1)}


def cost_space():
    return SearchSpace([Categorical(f"layers.{i}", (0, 1, 2, 3)) for i in range(20)])


def test_costs_are_exact_and_the_front_beats_a_random_one():
    space = cost_space()
    weights = np.random.default_rng(5).uniform(0.2, 2.0, (20, 4)).cumsum(axis=1)

    def measure(arch):
        codes = space.encode([arch])
        return Trial(arch, {"top1": float(weights[range(20), codes[0]].sum()), "flops": float(codes.sum())})

    objectives = Objectives((Objective("top1"), Objective("flops", "min")), pareto=True)
    problem = Problem(space, objectives, 160, cost)
    search = Predictor(initial=60, per_round=50, model="ridge").start(problem, np.random.default_rng(0))
    told = drive(search, problem, measure, batch=50)
    drawn = [measure(arch) for arch in space.decode(space.draw(np.random.default_rng(9), 160))]

    def volume(trials):
        front = sorted(objectives.front(trials), key=lambda trial: trial.metrics["flops"])
        ends = [*(trial.metrics["flops"] for trial in front[1:]), 60.0]
        return sum(t.metrics["top1"] * (end - t.metrics["flops"]) for t, end in zip(front, ends, strict=True))

    assert volume(told) > 1.15 * volume(drawn)
    predicted = [item for item in search.ask(9) if isinstance(item, Proposal)]
    assert not any("flops_predicted" in item.extra for item in predicted)


def test_constraints_on_what_is_measured_are_predicted():
    space = cost_space()

    def measure(arch):
        codes = space.encode([arch])[0]
        trial = Trial(arch, {"top1": float(codes.sum()), "latency": float(codes[:10].sum())})
        return trial if trial.metrics["latency"] <= 8 else Trial(arch, trial.metrics, "infeasible", error="slow")

    problem = Problem(space, Objectives((Objective("top1"),)), 120, None, [Constraint("latency", high=8)])
    search = Predictor(initial=60, per_round=20, model="ridge").start(problem, np.random.default_rng(0))
    told = drive(search, problem, measure)
    met = [trial.metrics["latency"] <= 8 for trial in told]
    assert sum(met[:60]) < 20  # hardly any arch at random
    assert sum(met[60:]) > 50
    assert max(trial.metrics["top1"] for trial in told if trial.ok) >= 36  # of 38


def test_another_budget_begins_with_what_earlier_searches_have_measured():
    problem, measure = simple_problem(), additive(large_space())
    known = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, rounds=4)
    again = Problem(problem.space, problem.objectives, problem.budget, known=known)
    asked = SMALL.start(again, np.random.default_rng(1)).ask(10)
    assert all(isinstance(item, Proposal) and item.extra["round"] == 1 for item in asked)
    gains = [measure(item.arch).metrics["gain"] for item in asked]
    assert min(gains) > np.median([trial.metrics["gain"] for trial in known])


@pytest.fixture(scope="module")
def measured_file(tmp_path_factory):
    """200 archs of the small network as CSV: `top1` is the sum of their codes, `ms` is there for half of them."""
    space = make_space()
    archs = space.decode(np.unique(space.draw(np.random.default_rng(0), 200), axis=0))
    totals = space.encode(archs).sum(axis=1)
    lines = [",".join([*space.keys, "top1", "ms"])]
    for at, (arch, total) in enumerate(zip(archs, totals, strict=True)):
        lines.append(",".join(map(str, [*arch.values(), total, at if at % 2 else ""])))
    file = tmp_path_factory.mktemp("measured") / "m.csv"
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("check", evaluator_checks)
def test_the_evaluator_conforms(check, measured_file):
    check(Predicted(str(measured_file), ("top1", Target("ms", "ms", "min")), "ridge"))


class Context:
    space = make_space()


def test_the_evaluator_predicts_what_it_was_fitted_to_and_says_how_well(measured_file):
    space = Context.space
    archs = space.decode(space.draw(np.random.default_rng(9), 50))
    found = Predicted(str(measured_file), ("top1",), "ridge").start(Context())(archs, 1.0)
    told = agreement([one.metrics["predicted_top1"] for one in found], space.encode(archs).sum(axis=1))
    assert told["spearman"] > 0.9
    assert found[0].extra["predicted_top1_spearman"] > 0.9


def test_the_evaluator_refuses_what_it_cannot_be_fitted_to(measured_file, tmp_path):
    for source, metric, text in [
        (str(measured_file), "top5", "0 of .* rows are archs of this space with a number for 'top5'"),
        (str(tmp_path / "no.csv"), "top1", "cannot read this"),
        (str(tmp_path), "top1", "run.sqlite"),
    ]:
        with pytest.raises(UserError, match=text):
            Predicted(source, (metric,)).start(Context())


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    catalogue = load_catalogue()
    found = [catalogue.options("searchers", spec["searcher"]) for spec in fragments if "searcher" in spec]
    assert found == [Predictor(initial=100)]
    found = [catalogue.options("evaluators", spec["evaluators"][0]) for spec in fragments if "evaluators" in spec]
    assert found == [Predicted("runs/ofa", (Target("top1", "%"),))]
