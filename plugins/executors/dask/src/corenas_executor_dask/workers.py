"""A Dask cluster as a `concurrent.futures.Executor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent import futures
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
from distributed import Client, KilledWorker, LocalCluster

from corenas.errors import UserError
from corenas.remote import RemoteExecutor

if TYPE_CHECKING:
    from corenas_executor_dask import Dask

_QUEUES = {name.lower(): f"{name}Cluster" for name in ("SLURM", "PBS", "SGE", "LSF", "HTCondor", "Moab", "OAR")}
_PATIENCE = "30s"
"""How long a scheduler may take to answer."""


def started(options: Dask) -> Workers:
    """Return the workers that options ask for. Raises UserError if there are none."""
    if options.scheduler is not None and options.queue is not None:
        raise UserError("`scheduler` and `queue` exclude each other", key=("executor",))
    if options.scheduler is not None:
        try:
            return Workers(Client(options.scheduler, timeout=_PATIENCE, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            text = f"no Dask scheduler answers at {options.scheduler}: {error}"
            raise UserError(text, key=("executor", "scheduler"), hint="dask scheduler") from None
    cluster = _local(options) if options.queue is None else _queued(options.queue, options.workers)
    return Workers(Client(cluster, set_as_default=False), cluster)


def _local(options: Dask) -> Any:
    # The search measures again what was lost with a worker, apart from the rest; Dask need not.
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        return LocalCluster(
            n_workers=options.workers or os.cpu_count() or 1,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            env={f"{name}_NUM_THREADS": str(options.threads) for name in ("OMP", "MKL", "OPENBLAS")},
            memory_limit=0,  # Dask's limit, a worker's share of the memory, counts what processes share
        )


def _queued(queue: Mapping[str, Any], workers: int | None) -> Any:
    name = _QUEUES.get(str(queue.get("type")))
    if name is None:
        raise UserError(f"no such queue: {queue.get('type')!r}", key=("executor", "queue"), hint=", ".join(_QUEUES))
    try:
        import dask_jobqueue
    except ImportError:
        hint = 'pip install "corenas-executor-dask[jobqueue]"'
        raise UserError("queues want dask-jobqueue, which is not installed", key=("executor",), hint=hint) from None
    try:
        cluster = getattr(dask_jobqueue, name)(**{key: item for key, item in queue.items() if key != "type"})
    except (TypeError, ValueError) as error:
        raise UserError(f"dask-jobqueue refuses this queue: {error}", key=("executor", "queue")) from error
    cluster.adapt(minimum_jobs=0, maximum_jobs=workers or 1)
    return cluster


class Workers(RemoteExecutor):
    """The workers of a Dask cluster.

    cluster: what is closed in the end with the client
    """

    def __init__(self, client: Client, cluster: Any = None) -> None:
        super().__init__()
        self._client, self._cluster = client, cluster

    def send(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a task to the cluster."""
        return self._client.submit(partial(fn, *args, **kwargs), pure=False)

    def follow(self, task: Any, own: futures.Future[Any]) -> None:
        """Give a future what becomes of its task."""
        task.add_done_callback(lambda task: _hand_over(task, own))

    def call_off(self, task: Any) -> None:
        """Let the cluster drop a task."""
        task.cancel()

    def close(self) -> None:
        """Close client and cluster."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _hand_over(task: Any, own: futures.Future[Any]) -> None:
    """Give a future what has become of its task."""
    if task.status == "cancelled" or not own.set_running_or_notify_cancel():
        own.cancel()
        return
    error = task.exception()
    if error is None:
        own.set_result(task.result())
    elif isinstance(error, KilledWorker):
        own.set_exception(futures.BrokenExecutor("the Dask worker that measured it is gone"))
    else:
        own.set_exception(error)
