"""How a worker of an executor measures archs: it reads the spec's data and the run's supernet the first time."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve, frozen

from corenas.contracts import Rival
from corenas.errors import UserError
from corenas.measure import TrialRunner, is_costly, largest_batch
from corenas.objectives import Trial
from corenas.plugins import file_digest, import_file
from corenas.run.prepare import load_supernet, prepare, start_trial_runner, trials_folder
from corenas.run.spec import Spec

_runners: dict[str, TrialRunner] = {}
"""What this process measures with, by the fingerprint of the spec and the weights. Workers may outlive a run."""
_MOST_RUNNERS = 2
"""How many are kept: each has a supernet and the data."""
_ONE_AT_A_TIME = threading.Lock()
"""A worker may have several threads (Dask's own default), and its supernet is under one arch at a time."""


@frozen
class WorkerRunner:
    """Measures trials in a worker. It pickles, and is small.

    spec: pickled; it is read in the worker
    plugins: files of which it has components, with their digests
    number: which of the run's searches this is
    folder: the run directory, which the worker sees
    fingerprint: another one where the spec, the search or the weights of the supernet are others
    rival: whom archs race against; None where they do not
    """

    spec: bytes
    plugins: Sequence[tuple[str, str]]
    number: int
    folder: Path
    fingerprint: str
    batch: int
    rival: Rival | None = None

    @classmethod
    def of(cls, spec: Spec, number: int, folder: Path, weights: str | None) -> WorkerRunner:
        """Return the runner of one of a spec's searches; `weights` is the digest of its supernet's."""
        pickled = pickle.dumps(spec)
        fingerprint = hashlib.sha256(pickled + f"{number} {weights}".encode()).hexdigest()
        batch = largest_batch(spec.evaluators)
        plugins = [(file, file_digest(Path(file))) for file in spec.plugins]
        return cls(pickled, plugins, number, folder, fingerprint, batch)

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials, measured by what is costly."""
        with _ONE_AT_A_TIME:
            if self.fingerprint not in _runners:
                while len(_runners) >= _MOST_RUNNERS:
                    del _runners[next(iter(_runners))]
                _runners[self.fingerprint] = self._started()
            return evolve(_runners[self.fingerprint], rival=self.rival)(trials)

    def _started(self) -> TrialRunner:
        for file, digest in self.plugins:
            if file_digest(Path(file)) != digest:
                raise UserError("this file has changed since the run took components from it", file=file)
            import_file(Path(file))
        prepared = prepare(pickle.loads(self.spec))
        supernet = load_supernet(prepared, self.folder) if prepared.has_supernet else None
        return start_trial_runner(
            prepared, self.number, supernet, is_costly, costs=False, trials=trials_folder(prepared, self.folder)
        )
