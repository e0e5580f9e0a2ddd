"""One rank of an update: prepare beside the serving engine, then apply, undo and release between its steps.

    idle --prepare--> PREPARED --apply--> APPLIED --release--> idle
                         |                 |   |
                         +------ undo <----+   +--retain--> idle, the way back kept: prepared when it is asked for

Everything long happens in a daemon thread before the pause: mapping, checking, comparing, hashing.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hotweights.adapters import kv_cache, memory
from hotweights.adapters.checkpoint import checkpoint_folder
from hotweights.adapters.components import NotTogether, Source, Together, model_of, source
from hotweights.adapters.direct import nothing_direct
from hotweights.adapters.fingerprint import (
    Probe,
    combine,
    combine_tensors,
    digest_tensors,
    packed_layers,
    tensor_digests,
)
from hotweights.adapters.finite import check_finite as check_all_finite
from hotweights.adapters.jobs import Job, quietly
from hotweights.adapters.lent import LentImage
from hotweights.adapters.mapped import BadImage, MappedImage, TensorSpec, check_specs, has_draft, read_specs
from hotweights.adapters.plans import Plans
from hotweights.adapters.prepared import PROBE_SLICE_S, Prepared
from hotweights.adapters.twins import NoShadow
from hotweights.adapters.undo import storages_bytes, storages_of
from hotweights.adapters.update import Made, Maker, NotProven, packed_bytes
from hotweights.worker_client.config import load_config
from hotweights.worker_client.window.failpoints import Failpoints, parse_failpoints

log = logging.getLogger(__name__)

DROP_DEADLINE_S = 60.0
DROP_WAIT_S = 0.02  # a serving engine waits no longer: giving memory back to the system takes tens of ms a GB


class RankRefused(Exception):
    """The call cannot be done; nothing was changed by it."""


class NotDirect(Exception):
    """HOTWEIGHTS_ROUTE asks for what this model cannot be written by; the text names a module and why."""


class Rank:
    """The state of one worker. Calls come from the worker's main loop, one at a time."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._served: Mapping[str, TensorSpec] | None = None
        self._job: Job | None = None
        self._folder: Path | None = None
        self._checking = False
        self._prepared: Prepared | None = None
        self._retained: Prepared | None = None
        self._clearing_s = 0.0
        self._plans = Plans()
        self._dropping: list[Job] = []
        self._closing: list[MappedImage] = []
        self._fingerprint: tuple[Job, Probe] | None = None
        self._found: tuple[str, bytes] | None = None

    @property
    def model(self) -> torch.nn.Module:
        """With the draft that belongs to it."""
        return model_of(self._worker)

    @property
    def _device(self) -> torch.device:
        return torch.device(getattr(self._worker, "device", "cpu"))

    # Preparing

    def prepare(
        self,
        folder: Path,
        name_map: Mapping[str, str],
        *,
        check_finite: bool = False,
        base: Path | None = None,
        anew: bool = False,
        lent: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Starts to prepare; the same folder again goes on with what was begun, unless `anew`.

        `base` is the image that is installed, where one is known. `lent` says where others hold this one in GPU memory:
        `memories`, as LentImage takes them, for `left_s` seconds more.
        """
        held = self._prepared
        same = self._folder == folder and (self._checking or not check_finite) and not anew
        if same and held is not None and not held.applied:
            held.look_at_caches(self._worker.model_runner)
            return
        if self._job is not None and not self._job.done:
            if same:
                return
            raise RankRefused(f"still preparing {self._folder}")
        retained, names = None, dict(name_map)
        if self._retained is not None and self._retained.folder == folder and not check_finite:
            retained, self._retained = self._retained, None
        self.release()
        dropping, self._dropping = self._dropping, []
        memories, ends_at = lent.get("memories", ()), time.monotonic() + lent.get("left_s", 0.0)
        self._folder, self._checking = folder, check_finite
        self._job = Job(
            "prepare",
            lambda: quietly(
                lambda: self._prepare(folder, names, check_finite, base, (memories, ends_at), retained, dropping)
            ),
        )

    def _prepare(
        self,
        folder: Path,
        name_map: Mapping[str, str],
        check_finite: bool,
        base: Path | None,
        lent: tuple[Sequence[Mapping[str, Any]], float],
        retained: Prepared | None,
        dropping: list[Job],
    ) -> Prepared:
        for job in dropping:  # its shadow leaves vLLM's books before another enters them
            job.wait(DROP_DEADLINE_S)
        try:
            _failpoints().hit("prepare.start")
            if retained is not None and self._holds_still(retained):
                kept, retained = retained, None
                return kept
        finally:
            if retained is not None:
                retained.drop()
                retained.image.close()
        draft = self._has_own_draft()
        if not draft and has_draft(folder) and source(self._worker) is not Source.NONE:
            raise NotTogether(
                "the version has a draft model, in its folder draft, but the engine loaded its own from another place: "
                'start it with speculative_config {"model": CHECKPOINT/draft}, where CHECKPOINT is its --model'
            )
        if draft and not has_draft(folder):
            raise NotTogether("the version has no draft model, and the engine's is of its checkpoint: publish both")
        image = MappedImage(folder, name_map, draft=draft)
        try:
            served = self._served_specs()
            if served is not None:
                check_specs(image.specs, served)
            if check_finite:
                check_all_finite(image)
            memory.require("the update and the way back", self._bytes_needed())
            image.populate()
            installed = None if base is None else MappedImage(base, name_map, draft=draft)
        except Exception:
            image.close()
            raise
        borrowed: LentImage | None = None
        try:
            borrowed = LentImage(*lent, image, self._device) if lent[0] else None
            made = self._make(image, installed, borrowed, whole=served is not None)
        except Exception:
            for opened in (borrowed, image, installed):
                if opened is not None:
                    opened.close()
            raise
        return Prepared(folder, image, made, image.specs, installed, borrowed)

    def _make(self, image: MappedImage, base: MappedImage | None, lent: LentImage | None, *, whole: bool) -> Made:
        """By HOTWEIGHTS_ROUTE; `auto` takes for each module the first route that is known to be right."""
        wanted, model = load_config().route, self.model
        self._plans.check_together(model, image)
        before = self._digests()
        if wanted in ("auto", "direct"):
            split = self._plans.split(model, image, base, combine_tensors(before))
        else:
            split = nothing_direct(model, self._plans.plan(model, image), f"HOTWEIGHTS_ROUTE is {wanted}")
        if wanted == "direct" and split.reasons:
            name, reason = next(iter(split.reasons.items()))
            raise NotDirect(f"{len(split.reasons)} modules cannot be written directly, first {name}: {reason}")
        # Whoever asks for vLLM's reload has it without a rehearsal.
        rehearsal = base if not self._plans.rehearsed and wanted != "reload" else None
        plan, budget = self._plans.plan(model, image), self._device_budget()
        maker = Maker(
            self._worker, image, plan, split, whole=whole, base=rehearsal, device_budget_bytes=budget, lent=lent
        )
        if wanted != "reload":
            try:
                made = maker.make(before, maker.assemble())
            except NoShadow as error:
                if wanted == "assembled":
                    raise
                log.warning("the route of some modules is reload, with a longer pause: %s", error)
            else:
                # What is left to the pause is rehearsed there.
                self._plans.rehearsed |= made.routes.assembled[0] > 0 and not made.routes.reload[0] and base is not None
                return made
        return maker.make(before, None)

    def _device_budget(self) -> int:
        """Bytes of device memory for what is prepared; unless set, a quarter of what is free now."""
        wanted = load_config().device_budget
        device = self._device
        if wanted is None and device.type == "cuda":
            # What torch keeps for itself, and does not use, is free too.
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return (int(torch.cuda.mem_get_info(device)[0]) + kept) // 4
        return wanted or 0

    def _holds_still(self, retained: Prepared) -> bool:
        """Whether the model is what this is the way back from: nobody wrote to it, and it did not sleep it away."""
        try:
            retained.image.check_unaltered()
        except BadImage:  # staged again since, by an agent that had lost it
            return False
        return combine_tensors(self._digests()) == retained.made.tensors_before

    def _digests(self) -> dict[str, bytes]:
        """Of every tensor that the model holds now."""
        return tensor_digests(self.model, threads=1)

    def _served_specs(self) -> Mapping[str, TensorSpec] | None:
        """Tensors of the checkpoint that is served; None when the engine has none (dummy or streamed weights)."""
        if self._served is None and self._worker.vllm_config.load_config.load_format != "dummy":
            folder = checkpoint_folder(self._worker.model_config)
            if folder is None:
                log.warning("the engine's checkpoint is not here: names and shapes are checked only while applying")
                return None
            self._served = read_specs(folder, draft=self._has_own_draft())
        return self._served

    def _has_own_draft(self) -> bool:
        """Whether a draft model that has files of its own goes with the target."""
        model = self.model
        return isinstance(model, Together) and model.source is Source.OWN

    def _bytes_needed(self) -> int:
        """Of all ranks here, at most: every tensor as it was and as it is to be, and packed weights twice.

        And what storages pass through meanwhile, on a device those of now too.
        """
        layers = list(self.model.modules())
        largest = max((storage.nbytes() for storage in storages_of(layers).values()), default=0)
        passing = largest * (1 if self._device.type == "cpu" else 2)
        packed = sum(packed_bytes(layer) for _, layer, _ in packed_layers(self.model))
        return self._ranks_here() * (2 * (storages_bytes(layers) + packed) + passing)

    def _ranks_here(self) -> int:
        parallel = self._worker.vllm_config.parallel_config
        return int(getattr(parallel, "local_world_size", 0) or parallel.world_size)

    def prepared(self) -> Prepared | None:
        """The update once it can be applied, None while it cannot. Raises why it never will."""
        if self._job is not None:
            if not self._job.done:
                return None
            job, self._job = self._job, None
            self._prepared = job.result()
            self._prepared.look_at_caches(self._worker.model_runner)
        if self._prepared is None:
            raise RankRefused("nothing is being prepared")
        return self._prepared if self._prepared.ready() else None

    # The window

    def apply(self, folder: Path) -> Prepared:
        """Writes the prepared image of `folder`. What it raises leaves the undo to the caller."""
        held = self._prepared
        if held is None or not held.before or held.folder != folder:
            raise RankRefused(f"{folder} is not prepared")
        if held.applied:
            raise RankRefused(f"{folder} was applied already")
        update = held.made.update
        update.check_current()
        held.image.check_unaltered()
        if held.lent is not None and not held.lent.is_readable:
            log.info("what was lent is due back: values come from host memory")
            held.give_back()
        self._fingerprint = self._found = None  # one that is being computed would mix old and new
        held.applied, held.specs_before = True, self._served
        points = _failpoints()
        points.hit("apply.start")
        self.synchronize()
        self._clearing_s = 0.0
        update.write(lambda count: points.hit("apply.tensor", count))
        if held.caches_spoilt:
            self._clear_caches("a value in it was NaN or infinite")
        self.synchronize()
        points.hit("apply.end")
        self._served = held.specs
        self._plans.written(held.made.tensors_before, held.made.tensors_after)
        self._plans.rehearsed |= update.rehearsed
        return held

    def prove_written(self) -> bytes:
        """Reads back what the apply wrote; its digest. Raises NotProven: the undo follows.

        What was lent and is something else is written once more, from the host.
        """
        held = self._prepared
        assert held is not None
        update = held.made.update
        try:
            return update.prove_written()
        except NotProven as error:
            if held.lent is None:
                raise
            log.warning("what was lent is not this version; it is written from host memory: %s", error)
        held.give_back()
        self.synchronize()
        update.write_devices()
        self.synchronize()
        return update.prove_written()

    def undo(self, *, clear_caches: bool = False) -> None:
        """Puts back what was served before the apply."""
        held = self._prepared
        if held is None:
            raise RankRefused("nothing is kept to go back to")
        _failpoints().hit("undo.start")
        if held.applied:
            self._fingerprint = self._found = None
            self._clearing_s = 0.0
            self.synchronize()
            held.made.update.undo()
            if clear_caches:
                self._clear_caches("the engine ran on the version that is taken back")
            self.synchronize()
            self._served, held.applied = held.specs_before, False

    @property
    def spent_s(self) -> tuple[float, float]:
        """Seconds of the last apply or undo: of reading back, and of clearing the KV cache."""
        held = self._prepared
        return (0.0 if held is None else held.made.update.read_back_s), self._clearing_s

    def prove_undone(self) -> None:
        """Reads back what the undo put back. Raises NotProven."""
        assert self._prepared is not None
        self._prepared.made.update.prove_undone()

    def _clear_caches(self, reason: str) -> None:
        log.info("clearing the KV cache: %s", reason)
        begun = time.perf_counter()
        kv_cache.clear(self._worker.model_runner)
        self._clearing_s = time.perf_counter() - begun

    def retain(self, folder: Path) -> bool:
        """Keeps the way back from what was applied, ready to be prepared as the image in `folder`.

        False where there is none, or no memory to spare for it: release it then.
        """
        if self._retained is not None and self._retained.folder == folder:
            return True
        held = self._prepared
        back = None if held is None else held.way_back(folder)
        if back is None or not self._can_spare(back):
            return False
        assert held is not None
        held.give_back()
        self._drop(self._retained)
        self._prepared, self._folder, self._retained = None, None, back
        return True

    def settle(self) -> bool:
        """Unmaps what was dropped. False while something still holds a tensor of it."""
        self._dropping = [job for job in self._dropping if not job.wait(DROP_WAIT_S)]
        if self._dropping:
            return False
        self._closing = [image for image in self._closing if not image.close()]
        return not self._closing

    def _can_spare(self, back: Prepared) -> bool:
        """Whether as much as it takes is free beside it."""
        packed = sum(packed_bytes(layer) for _, layer, _ in packed_layers(self.model))
        available = memory.available_bytes()
        needed = self._ranks_here() * (packed + sum(write.new_bytes for write in back.made.update.writes))
        return available is None or needed < available

    def _drop(self, held: Prepared | None) -> None:
        """In another thread: `release` finds it done."""
        if held is not None:
            self._closing.append(held.image)
            self._dropping.append(Job("drop", held.drop))

    def release(self) -> bool:
        """Drops what was prepared and unmaps. False while something still holds a tensor of the mapping."""
        if self._job is not None:
            if not self._job.done:
                raise RankRefused(f"still preparing {self._folder}")
            job, self._job = self._job, None
            try:
                self._prepared = job.result()
            except Exception:  # noqa: BLE001 - it was reported to whoever polled, or nobody asked
                self._prepared = None
        self._drop(self._prepared)
        self._drop(self._retained)
        self._prepared, self._retained, self._folder = None, None, None
        return self.settle()

    def fingerprint_step(self, asked: str = "") -> bytes | None:
        """The fingerprint outside a window, in steps; None while it is not ready. Kept for whoever asked for it."""
        if asked and self._found is not None and self._found[0] == asked:
            return self._found[1]
        if self._fingerprint is None:
            model = self.model
            self._fingerprint = (
                Job("fingerprint", lambda: quietly(lambda: digest_tensors(model, threads=1))),
                Probe(model),
            )
        job, probe = self._fingerprint
        if not job.done or not probe.run(PROBE_SLICE_S):
            return None
        self._fingerprint = None
        self._found = asked, combine(job.result(), probe)
        return self._found[1]

    def synchronize(self) -> None:
        """FACTS: the device is idle before the first write and after the last."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()


def _failpoints() -> Failpoints:
    return parse_failpoints(load_config().failpoints)
