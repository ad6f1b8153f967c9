"""What executors of clusters share: tasks are sent away, followed, called off and waited for."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent import futures
from typing import Any


class RemoteExecutor(futures.Executor, ABC):
    """Runs tasks in a cluster's workers; a task whose worker has died ends in `BrokenExecutor`, the others go on.

    A plugin says how its cluster is sent a task, what becomes of it, and how it is called off.
    """

    def __init__(self) -> None:
        self._tasks: set[futures.Future[Any]] = set()
        self._lock, self._down = threading.Lock(), False

    @abstractmethod
    def send(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a task to the cluster. Returns what the cluster knows it by."""

    @abstractmethod
    def follow(self, task: Any, own: futures.Future[Any]) -> None:
        """Give a future, once a task has ended, its result or exception."""

    @abstractmethod
    def call_off(self, task: Any) -> None:
        """Tell the cluster that nobody waits for a task any more."""

    @abstractmethod
    def close(self) -> None:
        """Leave the cluster, or end one of one's own."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Give a task to the cluster."""
        own: futures.Future[Any] = futures.Future()
        with self._lock:
            if self._down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            task = self.send(fn, args, kwargs)
            self._tasks.add(own)
        own.add_done_callback(lambda own: self._done(own, task))
        self.follow(task, own)
        return own

    def _done(self, own: futures.Future[Any], task: Any) -> None:
        self._tasks.discard(own)
        if own.cancelled():
            self.call_off(task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close, after what runs has ended unless it need not be waited for."""
        with self._lock:
            already, self._down = self._down, True
        if already:
            return
        if cancel_futures or not wait:
            for own in [*self._tasks]:
                own.cancel()
        futures.wait([*self._tasks])
        self.close()
