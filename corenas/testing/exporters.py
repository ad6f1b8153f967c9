"""What every exporter promises: `@pytest.mark.parametrize("check", exporter_checks)` in a plugin's tests.

Each check takes the options of an exporter, which write the small network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import evolve
from torch import nn

from corenas.contracts import ExportContext, Exporter
from corenas.export import export_subnet
from corenas.testing.components import component_checks, global_generators_untouched
from corenas.testing.small import Task, condition, differing, make_space, some_archs, supernet

TITLE = 'a network\'s "best" arch \\ of 1e6 flops — été, at 80 % (2 of 3)'

CONTEXT = ExportContext(Task().example, "a network", lambda n: Task().data["train"][0][:n].split(16))
"""What it is written with."""


def network(seed: int = 0) -> nn.Module:
    """A subnet of the small supernet, as the core exports it, in evaluation mode."""
    space, task = make_space(), Task()
    model = supernet(space, task).train()
    model(task.data["train"][0])  # so that the statistics are no longer those of a new network
    return export_subnet(model, some_archs(space, 4, seed)[-1], task.example).eval()


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def writes_a_file_into_the_folder_and_gives_its_path(exporter: Exporter) -> None:
    """What it gives is a file that is not empty; all that it writes is in the folder, and a second time the same."""
    model = network()
    with _folder() as folder:
        (folder / "arch.toml").write_text("width = 8\n")
        path = exporter.write(model, folder, CONTEXT)
        assert path.is_file()
        assert path.parent == folder
        assert path.stat().st_size > 0
        assert (folder / "arch.toml").read_text() == "width = 8\n"
        before = {file: file.read_bytes() for file in folder.iterdir()}
        assert exporter.write(model, folder, CONTEXT) == path
        assert {*folder.iterdir()} == {*before}
        changed = [file.name for file, content in before.items() if file.read_bytes() != content]
        assert not changed, f"of the same network writes something else into {', '.join(changed)}"


def takes_any_title(exporter: Exporter) -> None:
    """A title may have quotes, backslashes and letters of any language."""
    model = network()
    with _folder() as folder:
        assert exporter.write(model, folder, evolve(CONTEXT, title=TITLE)).is_file()


def leaves_the_network_and_the_generators_as_they_were(exporter: Exporter) -> None:
    """Weights, modes, hooks and what it computes are as before; nothing is drawn from a global generator."""
    model = network()
    images = torch.randn((3, *CONTEXT.example.shape[1:]), generator=torch.Generator().manual_seed(0))
    before, drawn = condition(model), torch.get_rng_state()
    with torch.no_grad():
        outputs = model(images)
    with _folder() as folder, global_generators_untouched():
        exporter.write(model, folder, CONTEXT)
    assert not (changed := differing(before, condition(model))), f"changes the network's {', '.join(changed)}"
    assert torch.equal(drawn, torch.get_rng_state()), "drew from torch's global generator"
    with torch.no_grad():
        assert torch.equal(model(images), outputs)


def a_missing_folder_is_an_error_of_the_system(exporter: Exporter) -> None:
    """OSError, as for a full disk: the core tells the user of it. No folder is made."""
    model = network()
    with _folder() as folder:
        try:
            exporter.write(model, folder / "missing", CONTEXT)
        except OSError:
            assert not (folder / "missing").exists()
        else:
            raise AssertionError("wrote into a folder that is not there")


exporter_checks = [
    *component_checks,
    writes_a_file_into_the_folder_and_gives_its_path,
    takes_any_title,
    leaves_the_network_and_the_generators_as_they_were,
    a_missing_folder_is_an_error_of_the_system,
]
"""What every exporter keeps to."""
