"""One rank of an update: prepare beside the serving engine, then apply, undo and release between its steps.

    idle --prepare--> PREPARED --apply--> APPLIED --release--> idle
                         |                   |
                         +------ undo <------+        (undo is allowed as long as the copies are kept)

Everything long happens in a daemon thread before the pause: mapping, checking, cloning, hashing.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from hotweights.adapters import kv_cache, memory
from hotweights.adapters.assembled import AssembledRoute, one_thread
from hotweights.adapters.checkpoint import checkpoint_folder
from hotweights.adapters.fingerprint import Probe, Proof, combine, digest_tensors, packed_layers
from hotweights.adapters.finite import check_finite as check_all_finite
from hotweights.adapters.mapped import MappedImage, TensorSpec, check_specs, read_specs
from hotweights.adapters.routes import ReloadRoute, Route
from hotweights.adapters.shadow import NoShadow
from hotweights.adapters.undo import Copies, Snapshot, undo_bytes
from hotweights.worker_client.config import load_config
from hotweights.worker_client.window.failpoints import Failpoints, parse_failpoints

log = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_SLICE_S = 0.005  # a serving engine waits at most about this long for one poll


class RankRefused(Exception):
    """The call cannot be done; nothing was changed by it."""


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

    def result(self) -> Any:
        """After `done`. Raises what the work raised."""
        if self._error is not None:
            raise self._error
        return self._result


class NotProven(Exception):
    """What the apply left in the model is not what was assembled."""


class Update:
    """A prepared update of this rank."""

    def __init__(self, image: MappedImage, copies: Copies, route: Route, proof: Proof) -> None:
        self.image = image
        self.copies = copies
        self.route = route
        self.snapshot: Snapshot | None = None
        self.specs_before: Mapping[str, TensorSpec] | None = None
        self.expected = b""
        """The fingerprint of after; empty where only the write can tell."""
        self._proof = proof
        self._look: Job | None = None

    @property
    def before(self) -> bytes:
        """The fingerprint of before; empty until it is known."""
        return self._proof.fingerprint

    def look_at_caches(self, runner: Any) -> None:
        """Begins to, last of all: what is computed after that nobody looks at."""
        self._look = Job("caches", lambda: _quietly(lambda: kv_cache.may_be_spoilt(runner)))

    @property
    def caches_spoilt(self) -> bool:
        """Whether the apply clears the KV cache. After `ready`."""
        return self._look is not None and bool(self._look.result())

    def ready(self) -> bool:
        """Goes on with the probes for one slice; True once the fingerprints are known and the caches looked at."""
        if self._look is not None and not self._look.done:
            return False
        after = self.route.proof
        if not self._proof.run(PROBE_SLICE_S) or not (after is None or after.run(PROBE_SLICE_S)):
            return False
        if after is not None:
            self.expected = after.fingerprint
        return True


class Rank:
    """The state of one worker. Calls come from the worker's main loop, one at a time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._served: Mapping[str, TensorSpec] | None = None
        self._job: Job | None = None
        self._folder: Path | None = None
        self._checking = False
        self._update: Update | None = None
        self._closing: list[MappedImage] = []
        self._fingerprint: tuple[Job, Probe] | None = None

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._worker.model_runner.get_model()
        return model

    # Preparing

    def prepare(self, folder: Path, name_map: Mapping[str, str], *, check_finite: bool = False) -> None:
        """Starts to prepare; the same folder again goes on with what was begun."""
        update = self._update
        same = self._folder == folder and (self._checking or not check_finite)
        if same and update is not None and update.snapshot is None and update.route.keep():
            update.look_at_caches(self._worker.model_runner)
            return
        if self._job is not None and not self._job.done:
            if same:
                return
            raise RankRefused(f"still preparing {self._folder}")
        self.release()
        self._folder, self._checking = folder, check_finite
        self._job = Job("prepare", lambda: _quietly(lambda: self._prepare(folder, dict(name_map), check_finite)))

    def _prepare(self, folder: Path, name_map: Mapping[str, str], check_finite: bool) -> Update:
        _failpoints().hit("prepare.start")
        image, model = MappedImage(folder, name_map), self.model
        try:
            served = self._served_specs()
            if served is not None:
                check_specs(image.specs, served)
            if check_finite:
                check_all_finite(image)
            memory.require("the way back", self._bytes_needed())
            copies = Copies(model)
            image.populate()
            route = self._route(image, whole=served is not None)
            # After the assembly: had that touched the model, this would tell.
            proof = Proof(digest_tensors(model, threads=1), Probe(model))
        except Exception:
            image.close()
            raise
        return Update(image, copies, route, proof)

    def _route(self, image: MappedImage, *, whole: bool) -> Route:
        """By HOTWEIGHTS_ROUTE; `auto` assembles where it can and says why where it cannot."""
        wanted = load_config().route
        if wanted != "reload":
            try:
                memory.require("assembling", self._bytes_to_assemble())
                route = AssembledRoute(self._worker, image, whole=whole)
            except (NoShadow, memory.NotEnoughMemory) as error:
                if wanted == "assembled":
                    raise
                log.warning("the route is reload, with a longer pause: %s", error)
            else:
                log.info("the route is assembled")
                return route
        return ReloadRoute(self._worker, whole=whole)

    def _served_specs(self) -> Mapping[str, TensorSpec] | None:
        """Tensors of the checkpoint that is served; None when the engine has none (dummy or streamed weights)."""
        if self._served is None and self._worker.vllm_config.load_config.load_format != "dummy":
            folder = checkpoint_folder(self._worker.model_config)
            if folder is None:
                log.warning("the engine's checkpoint is not here: names and shapes are checked only while applying")
                return None
            self._served = read_specs(folder)
        return self._served

    def _bytes_needed(self) -> int:
        """Of all ranks here: the copies, and the packed weights that stand twice while both are kept."""
        model = self.model
        packed = sum(_packed_bytes(layer) for _, layer, _ in packed_layers(model))
        return self._ranks_here() * (undo_bytes(model) + packed)

    def _bytes_to_assemble(self) -> int:
        """Of all ranks here, after the copies: the shadow, its packed weights, and the largest layer on its way."""
        model = self.model
        packed = sum(_packed_bytes(layer) for _, layer, _ in packed_layers(model))
        largest = max((_packed_bytes(layer) for layer in model.modules()), default=0)
        return self._ranks_here() * (undo_bytes(model) + packed + largest)

    def _ranks_here(self) -> int:
        parallel = self._worker.vllm_config.parallel_config
        return int(getattr(parallel, "local_world_size", 0) or parallel.world_size)

    def prepared(self) -> Update | None:
        """The update once it can be applied, None while it cannot. Raises why it never will."""
        if self._job is not None:
            if not self._job.done:
                return None
            job, self._job = self._job, None
            self._update = job.result()
            self._update.look_at_caches(self._worker.model_runner)
        if self._update is None:
            raise RankRefused("nothing is being prepared")
        return self._update if self._update.ready() else None

    # The window

    def apply(self, folder: Path) -> tuple[Update, Probe]:
        """Writes the prepared image of `folder`; gives a probe that has asked most layers already.

        What it raises leaves the undo to the caller.
        """
        update = self._update
        if update is None or not update.before or self._folder != folder:
            raise RankRefused(f"{folder} is not prepared")
        if update.snapshot is not None:
            raise RankRefused(f"{folder} was applied already")
        if not update.route.keep():
            raise RankRefused(f"{folder} was given back after it was applied; prepare it again")
        update.copies.check_current(self.model)
        update.image.check_unaltered()
        self._fingerprint = None  # one that is being computed would mix old and new
        update.snapshot, update.specs_before = Snapshot(self.model), self._served
        points = _failpoints()
        points.hit("apply.start")
        self.synchronize()
        probe, assembled = Probe(self.model), update.route.proof
        if assembled is not None:
            probe.adopt(assembled.probe)

        def after(count: int) -> None:
            points.hit("apply.tensor", count)
            if assembled is None:
                probe.run_packed_anew()

        update.route.write(update.image, after)
        if update.caches_spoilt:
            self._clear_caches("a value in it was NaN or infinite")
        self.synchronize()
        points.hit("apply.end")
        self._served = update.image.specs
        return update, probe

    def undo(self, *, clear_caches: bool = False) -> bytes:
        """Puts back what was served before the apply, proves it and gives its fingerprint."""
        update = self._update
        if update is None:
            raise RankRefused("no copies are kept")
        _failpoints().hit("undo.start")
        if update.snapshot is not None:
            update.snapshot.put_back()
            update.copies.put_back()
            update.route.clean_up()
            if clear_caches:
                self._clear_caches("the engine ran on the version that is taken back")
            self.synchronize()
            self._served, update.snapshot = update.specs_before, None
        now = combine(digest_tensors(self.model), Probe(self.model))
        if now != update.before:
            raise RankRefused(
                f"fingerprint after the undo is {now.hex()}, before the apply it was {update.before.hex()}"
            )
        return now

    def _clear_caches(self, reason: str) -> None:
        log.info("clearing the KV cache: %s", reason)
        kv_cache.clear(self._worker.model_runner)

    def fingerprint_now(self, probe: Probe) -> bytes:
        """The proof of an apply, on all cores. Raises NotProven when it is known and another: the undo follows."""
        now, update = combine(digest_tensors(self.model), probe), self._update
        if update is not None and update.snapshot is not None:
            if update.expected not in (b"", now):
                raise NotProven(f"fingerprint is {now.hex()}, assembled was {update.expected.hex()}")
            update.route.written()
        return now

    def release(self) -> bool:
        """Drops copies and mapping. False while something still holds a tensor of the mapping."""
        if self._job is not None:
            if not self._job.done:
                raise RankRefused(f"still preparing {self._folder}")
            job, self._job = self._job, None
            try:
                self._update = job.result()
            except Exception:  # noqa: BLE001 - it was reported to whoever polled, or nobody asked
                self._update = None
        if self._update is not None:
            self._update.route.close()
            self._closing.append(self._update.image)
        self._update, self._folder = None, None
        self._closing = [image for image in self._closing if not image.close()]
        return not self._closing

    def fingerprint_step(self) -> bytes | None:
        """The fingerprint outside a window, in steps; None while it is not ready."""
        if self._fingerprint is None:
            model = self.model
            self._fingerprint = Job("fingerprint", lambda: digest_tensors(model, threads=1)), Probe(model)
        job, probe = self._fingerprint
        if not job.done or not probe.run(PROBE_SLICE_S):
            return None
        self._fingerprint = None
        return combine(job.result(), probe)

    def synchronize(self) -> None:
        """FACTS: the device is idle before the first write and after the last."""
        if torch.device(getattr(self._worker, "device", "cpu")).type != "cpu":
            torch.accelerator.synchronize()


def _packed_bytes(layer: torch.nn.Module) -> int:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    weight = get_layerwise_info(layer).restore_metadata[0].get("weight")
    return 0 if weight is None else int(weight.nbytes)


def _quietly(work: Callable[[], T]) -> T:
    """On one thread: the serving engine needs the cores more than this does."""
    with one_thread():
        return work()


def _failpoints() -> Failpoints:
    return parse_failpoints(load_config().failpoints)
