"""Work beside a serving engine: in threads of its own, which give way."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

NICE = 10  # a tenth of the weight of what serves
T = TypeVar("T")


class Job:
    """Work in a daemon thread: what it gave, or why not."""

    def __init__(self, name: str, work: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=f"hotweights-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # noqa: BLE001 - carried to the thread that asks, which raises it
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Whether it is done by then."""
        self._thread.join(seconds)
        return self.done

    def result(self) -> Any:
        """After `done`. Raises what the work raised."""
        if self._error is not None:
            raise self._error
        return self._result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch and oneDNN on one thread here, which leaves the cores to the serving engine.

    The number belongs to the calling thread; only one that never ran anything in parallel yet takes over the last set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quietly(work: Callable[[], T]) -> T:
    """On one thread, which gives way: vLLM binds a worker's threads to few cores, and this one is born to the same."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    with _one_thread():
        return work()
