"""A Ray cluster as a `concurrent.futures.Executor`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from corenas.errors import UserError
from corenas.remote import RemoteExecutor

if TYPE_CHECKING:
    from corenas_executor_ray import Ray

_PATIENCE = 30.0
"""Seconds that a cluster may take to answer."""
_SHARED_MEMORY = 100 << 20
"""Bytes for what is sent to the workers of a local cluster, archs and trials: near the least that Ray takes."""


def started(options: Ray) -> Workers:
    """Return the workers that options ask for. Raises UserError if there are none."""
    if options.address is not None:
        _listened_at(options.address)
    ray, closing = _ray(options.address), ExitStack()
    if not ray.is_initialized():  # what this process is connected to already is its owner's, who closes it as well
        try:
            _connect(ray, options, closing)
        except (OSError, ValueError, RuntimeError) as error:
            closing.close()
            raise _no_cluster(options.address or "this machine", error) from None
        except BaseException:
            closing.close()
            raise
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if 0 < most < options.threads:  # where none has any, one that has may join
        closing.close()
        text = f"no machine of this Ray cluster has the {options.threads} CPUs of a worker, but {most:g} at most"
        raise UserError(text, key=("executor", "threads"))
    return Workers(ray, options.threads, closing)


def _listened_at(address: str) -> None:
    """Raise UserError if nothing listens at an address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(f'expected "host:port" or "auto", found {address!r}', key=("executor", "address"))
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> UserError:
    text = f"no Ray cluster answers at {address}: {error}"
    return UserError(text, key=("executor", "address"), hint="ray start --head")


def _ray(address: str | None) -> Any:
    """Return the package. What it is told of by the environment has to stand there before it is imported."""
    # Under `uv run` it would copy the working directory to the workers and make an environment for each.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15: on a busy machine workers would hardly get on
    if address is None or _is_loopback(address.rpartition(":")[0]):
        # It takes another address of the machine for the loopback one and listens on all of them, except on systems
        # that it makes no clusters of; this one is to be such a system.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        hint = f"pip install ray (Python {version} may be too new for it)"
        raise UserError("this executor wants Ray, which is not installed", key=("executor",), hint=hint) from None
    return ray


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _connect(ray: Any, options: Ray, closing: ExitStack) -> None:
    """Connect this process to a cluster, a new one if there is no address; `closing` ends what was begun."""
    settings: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if options.address is None:
        # Sockets lie in it, to which a path has some 100 characters at most: TMPDIR may be too long.
        parent = "/tmp" if Path("/tmp").is_dir() else None
        folder = closing.enter_context(TemporaryDirectory(prefix="ray", dir=parent, ignore_cleanup_errors=True))
        settings |= {
            "num_cpus": (options.workers or os.cpu_count() or 1) * options.threads,
            "include_dashboard": False,
            "object_store_memory": _SHARED_MEMORY,
            "_temp_dir": folder,
        }
    driver = ray._private.worker
    # The one way to keep what the cluster tells, that a worker has died for instance, out of our stdout.
    closing.callback(setattr, driver, "print_worker_logs", driver.print_worker_logs)
    driver.print_worker_logs = partial(_to_stderr, driver.print_worker_logs)
    closing.callback(_end, ray)
    utils = ray._private.utils
    closing.callback(setattr, utils, "set_sigterm_handler", utils.set_sigterm_handler)
    utils.set_sigterm_handler = lambda handler: None  # it would be Ray's, by which the process ends
    with _interrupted_later():
        ray.init(options.address or "local", **settings)


def _end(ray: Any) -> None:
    """Disconnect from a cluster, and end one that was begun here."""
    with _interrupted_later() as listen, futures.ThreadPoolExecutor(1) as pool:
        ending = pool.submit(ray.shutdown)
        while not ending.done():  # its C++ takes our handlers away, after which a SIGTERM would be the end at once
            listen()
            futures.wait([ending], timeout=0.01)
        ending.result()


@contextmanager
def _interrupted_later() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and SIGINT wait: a cluster that is broken off as it begins leaves processes, or aborts this one.

    A second one does not wait. Yields what puts the handlers back that C++ has replaced; in the end it is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before, came = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, []

    def wait(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)  # type: ignore[operator]

    def listen() -> None:
        for number, handler in before.items():
            signal.signal(number, wait if callable(handler) else handler)

    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _to_stderr(write: Callable[..., None], data: Any, file: Any, *given: Any, **more: Any) -> None:
    write(data, sys.stderr, *given, **more)


def _called(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call in a worker. A cancelled task that runs goes on to its end: broken off in an import it spoils its worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return fn(*args, **kwargs)


class Workers(RemoteExecutor):
    """The workers of a Ray cluster.

    threads: CPUs that a worker takes, and threads of torch in it
    closing: what is closed in the end
    """

    def __init__(self, ray: Any, threads: int, closing: ExitStack) -> None:
        super().__init__()
        environment = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
        # The search measures again what was lost with a worker, apart from the rest; Ray need not.
        self._task = ray.remote(_called).options(num_cpus=threads, max_retries=0, runtime_env={"env_vars": environment})
        self._ray, self._closing = ray, closing

    def send(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a task to the cluster."""
        return self._task.remote(fn, args, kwargs)

    def follow(self, task: Any, own: futures.Future[Any]) -> None:
        """Give a future what becomes of its task."""
        task.future().add_done_callback(lambda done: self._hand_over(done, own))

    def call_off(self, task: Any) -> None:
        """Let the cluster drop a task."""
        self._ray.cancel(task)

    def close(self) -> None:
        """Disconnect, or end the local cluster."""
        self._closing.close()

    def _hand_over(self, done: futures.Future[Any], own: futures.Future[Any]) -> None:
        """Give a future what has become of its task."""
        if not own.set_running_or_notify_cancel():
            return
        error: Any = done.exception()
        lost = self._ray.exceptions
        if error is None:
            own.set_result(done.result())
        elif isinstance(error, lost.RayTaskError):
            own.set_exception(error.cause)
        elif isinstance(error, lost.OutOfMemoryError):
            own.set_exception(futures.BrokenExecutor("Ray ended the worker that measured it: memory ran out"))
        elif isinstance(error, lost.WorkerCrashedError | lost.NodeDiedError | lost.ObjectLostError):
            own.set_exception(futures.BrokenExecutor("the Ray worker that measured it is gone"))
        else:
            own.set_exception(error)
