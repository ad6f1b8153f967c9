"""Trials in the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent import futures
from typing import Any

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.hookspecs import hookimpl


@frozen
class Dask:
    """Measures trials in the workers of a Dask cluster: a local one, a running one, or one in a batch system's queue.

    scheduler: address of a running scheduler, "tcp://host:8786" for instance
    queue: how jobs are made by dask-jobqueue: `type`, which is "slurm", "pbs", "sge", "lsf", "htcondor", "moab" or
        "oar", and the arguments of its cluster (cores, memory, walltime, …); jobs come as there is work, and go
    workers: of a local cluster, as many as there are cores if left out; of a queue, jobs at most
    threads: of torch in each worker of a local cluster
    """

    scheduler: str | None = None
    queue: Mapping[str, Any] | None = field(default=None, hash=False)
    workers: int | None = field(default=None, validator=optional(ge(1)))
    threads: int = field(default=1, validator=ge(1))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        if self.scheduler is not None:
            return dict.fromkeys(("workers", "threads"), "the running cluster has its own")
        return {"threads": "jobs of a queue have their own"} if self.queue is not None else {}

    def start(self) -> futures.Executor:
        """Return the workers. Raises UserError for a scheduler that does not answer, or no such queue."""
        from corenas_executor_dask.workers import started

        return started(self)


@hookimpl
def corenas_executors() -> dict[str, type]:
    """The executor "dask"."""
    return {"dask": Dask}
