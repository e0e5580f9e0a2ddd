"""The controller's own thread and event loop: the engine's loop must not wait for it, nor it for the engine."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from hotweights.worker_client.window.controller import ReplicaController

log = logging.getLogger(__name__)

STOP_DEADLINE_S = 5.0


class ControllerThread:
    """Runs a controller beside an engine until closed. `hotweights_agent` on an engine is one of these."""

    def __init__(self, make: Callable[[], ReplicaController]) -> None:
        """`make` is called in the thread, on its running loop."""
        self._make = make
        self._controller: ReplicaController | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="hotweights-controller", daemon=True)

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:  # the end of the thread: whatever it was is said with its traceback
            log.exception("the controller ended; the engine serves on without updates")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._controller = self._make()
        await self._controller.run()

    @property
    def active_version(self) -> str:
        """Name of the version that is served; empty while it has none."""
        return "" if self._controller is None else self._controller.active_version

    def status(self) -> dict[str, Any]:
        """What is true now, in plain data; empty before the controller runs."""
        return {} if self._controller is None else self._controller.status()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the controller and waits a moment for its session to close."""
        controller, loop = self._controller, self._loop
        if controller is not None and loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(controller.close)
            except RuntimeError:  # the loop ended between the question and the call
                return
            self._thread.join(STOP_DEADLINE_S)
