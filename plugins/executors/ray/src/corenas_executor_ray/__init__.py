"""Trials in the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent import futures

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.hookspecs import hookimpl


@frozen
class Ray:
    """Measures trials in the workers of a Ray cluster: a local one, a running one, or that of the program it runs in.

    address: of a running cluster's head, "host:6379" for instance; "auto" for the one that this machine is part of
    workers: of a local cluster, as many as there are cores if left out
    threads: of torch in each worker; a worker takes as many CPUs of the cluster
    """

    address: str | None = None
    workers: int | None = field(default=None, validator=optional(ge(1)))
    threads: int = field(default=1, validator=ge(1))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        return {} if self.address is None else {"workers": "the running cluster has its own"}

    def start(self) -> futures.Executor:
        """Return the workers. Raises UserError for a cluster that does not answer, or has no CPUs for a worker."""
        from corenas_executor_ray.workers import started

        return started(self)


@hookimpl
def corenas_executors() -> dict[str, type]:
    """The executor "ray"."""
    return {"ray": Ray}
