"""A progress bar on stderr, where stderr is a terminal and nobody asked for JSON."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress, TaskID

    from hotweights.v1 import update_pb2

BARS_MAX = 16


class Bar:
    """`to(done, total)` moves it, in bytes; `each` shows one for every node. Without a terminal it does nothing."""

    def __init__(self, what: str, *, wanted: bool) -> None:
        self._progress: Progress | None = None
        if wanted and sys.stderr.isatty():
            self._progress = _new_progress()
            self._task = self._progress.add_task(what, total=None)
            self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def to(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def each(self, nodes: "Sequence[update_pb2.UpdateNode]") -> None:
        """A bar for each node that is not staged, BARS_MAX at most, under the one of all."""
        if self._progress is None:
            return
        self.to(sum(node.bytes_done for node in nodes), sum(node.bytes_total for node in nodes))
        for node in nodes:
            task = self._tasks.get(node.node_id)
            if node.staged:
                if task is not None:
                    self._progress.remove_task(self._tasks.pop(node.node_id))
            elif task is None and len(self._tasks) < BARS_MAX and node.bytes_total:
                self._tasks[node.node_id] = self._progress.add_task(node.node_id, total=node.bytes_total)
            elif task is not None:
                source = f" from {node.source_node_id}" if node.source_node_id else ""
                self._progress.update(task, description=f"  {node.node_id}{source}", completed=node.bytes_done)


def _new_progress() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
