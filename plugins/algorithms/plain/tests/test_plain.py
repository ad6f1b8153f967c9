from pathlib import Path

import pytest

from corenas.contracts import Algorithm, Progress
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.store import Store
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_algorithm_plain import Plain, corenas_algorithms

SPACE = Path(__file__).parents[4] / "spec" / "space" / "zennet-tiny.toml"
SPEC = f"""
space = {{ file = "{SPACE}", fix = "arch.toml" }}
backbone = {{ type = "zennet", in_channels = 1 }}
algorithm = "plain"
task = {{ type = "classification", data = "digits", valid = 200, test = 200 }}
train = {{ epochs = 2, batch_size = 64 }}
export.formats = ["safetensors"]
"""
ARCH = '"stages.0.op" = "BL"\n"stages.0.kernel" = 3\n"stages.0.width" = 24\n"stages.0.depth" = 2\n"stem.width" = 8\n'


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(Plain())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_plain")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"plain": Plain}
    assert isinstance(Plain(), Algorithm)
    assert Plain.stages == ("retrain",)
    with pytest.raises(UserError, match="no supernet"):
        Plain().start(None)


def run(folder, *settings, emit=lambda event: None):
    (folder / "arch.toml").write_text(ARCH)
    (folder / "spec.toml").write_text(SPEC)
    spec, _, catalogue = open_spec(folder / "spec.toml", settings)
    run_spec(spec, catalogue, folder / "run", emit)
    store = Store(folder / "run" / "run.sqlite", readonly=True)
    return store.get("result"), store.curve("retrain"), (folder / "run/best/network.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that was left alone ends with."""
    return run(tmp_path_factory.mktemp("plain"))


def test_the_network_of_a_file_is_trained_and_nothing_else(whole):
    result, curve, _ = whole
    arch = result["best"]["arch"]
    assert [arch[f"stages.0.{key}"] for key in ("op", "kernel", "width", "depth")] == ["BL", 3, 24, 2]
    assert arch["stages.1.width"] == 40  # what the file leaves out is as in default
    assert len(curve) == 2
    assert result["trials"] == 0
    assert result["best"]["test"]["top1"] > 30


def test_killed_it_ends_with_the_same_bits(whole, tmp_path):
    def kill(event):
        if isinstance(event, Progress) and event.point:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, emit=kill)
    result, curve, network = run(tmp_path)
    assert (result["table"], curve, network) == (whole[0]["table"], *whole[1:])


def test_it_is_trained_as_retrain_says_if_that_says_anything(whole, tmp_path):
    _, curve, network = run(tmp_path, "retrain.train.epochs=1", "retrain.train.batch_size=64")
    assert len(curve) == 1
    assert network != whole[2]


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("algorithms", spec["algorithm"]) == Plain()
    assert spec["space"]["fix"] == "runs/quickstart/best/arch.toml"
