"""An update of one rank, made ready beside the serving engine, and the way back from it.

    image --load plan--> what the modules are to hold ----+        (values may come from GPU memory that others lend)
          --shadow-----> what packed layers are to hold --+--difference--> writes, and the fingerprint of after
          --reload, in the pause, for everything else

What is written in the pause is read back there; everything is fingerprinted before it and after it.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from blake3 import blake3

from hotweights.adapters.components import model_of
from hotweights.adapters.device_writes import DeviceWhole, DeviceWrite, ReadBack, device_write
from hotweights.adapters.direct import Split, spread
from hotweights.adapters.fingerprint import (
    Probe,
    Proof,
    combine_tensors,
    digest_tensor,
    live_tensors,
)
from hotweights.adapters.lent import LentImage
from hotweights.adapters.load_plan import Copy, LoadPlan, named_tensors
from hotweights.adapters.mapped import MappedImage
from hotweights.adapters.placed import Budget
from hotweights.adapters.routes import AfterTensors, NotReproduced, Reload
from hotweights.adapters.scratch import Scratch
from hotweights.adapters.shadow import Shadow, beyond
from hotweights.adapters.twins import NoShadow
from hotweights.adapters.undo import ChangedSincePrepare, storage_bytes, storages_of
from hotweights.adapters.views import are_all, by_storage, moved
from hotweights.adapters.writes import Difference, Function, Reversed, Write, difference, host_write

REASONS_MAX = 8
_NUMBERS = re.compile("[0-9]+")

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class NotProven(Exception):
    """What is read back is not what was written."""


@dataclass
class Routes:
    """By which routes a rank is written: modules, and bytes of their tensors."""

    direct: tuple[int, int] = (0, 0)
    assembled: tuple[int, int] = (0, 0)
    reload: tuple[int, int] = (0, 0)
    reasons: tuple[str, ...] = ()
    """Why modules are not written directly; the most frequent first."""
    sources: tuple[str, ...] = ()
    """Whose GPU memory values come from, or why from nobody's; empty where none was lent."""


class Update:
    """What one window does to one rank. `write` and `undo` only while the engine is paused."""

    def __init__(
        self,
        model: torch.nn.Module,
        writes: Sequence[Write],
        reload: Reload | None,
        read_back: ReadBack | None = None,
    ) -> None:
        """`read_back` is of those writes that are on a device; made if not given."""
        self.writes = writes
        self._model, self._reload = model, reload
        self._storages = _sizes(model)
        self._on_devices = [at for at, write in enumerate(writes) if not write.on_host]
        on_devices = [write for write in writes if isinstance(write, DeviceWrite)]
        self._read_back = read_back or (ReadBack(on_devices) if on_devices else None)
        self._proofs = b"".join(write.new_proof for write in writes)
        self.read_back_s = 0.0

    @property
    def rehearsed(self) -> bool:
        """Whether a reload was rehearsed in the pause."""
        return self._reload is not None and self._reload.rehearsed

    def check_current(self) -> None:
        """Raises ChangedSincePrepare unless the model still consists of the tensors this was made for."""
        if _sizes(self._model) != self._storages:
            raise ChangedSincePrepare("tensors of the model were replaced since the update was prepared; prepare again")

    def write(self, after: AfterTensors) -> None:
        """Reads back what lies on the host as it goes. What it raises, NotProven too, leaves the undo to the caller."""
        self.read_back_s = 0.0
        for count, write in enumerate(self.writes):
            after(count)
            write.write()
            if write.on_host:
                self._prove(count, write.new_proof)
        count = len(self.writes)
        after(count)
        if self._reload is not None:
            self._reload.write(lambda more: after(count + more))

    def write_devices(self) -> None:
        """Writes once more what lies on devices."""
        for at in self._on_devices:
            self.writes[at].write()

    def undo(self) -> None:
        """From wherever `write` got to. Raises NotProven where it reads back something else than was there before."""
        self.read_back_s = 0.0
        if self._reload is not None:
            self._reload.undo()
        for count, write in enumerate(self.writes):
            write.undo()
            if write.on_host:
                self._prove(count, write.old_proof)

    def _prove(self, at: int, proof: bytes) -> None:
        begun = time.perf_counter()
        if self.writes[at].proof() != proof:
            raise NotProven(self._otherwise(at))
        self.read_back_s += time.perf_counter() - begun

    def reversed(self) -> "Update | None":
        """The way back of an update that was written, as one to write; None where a reload must be undone for it."""
        if self._reload is not None:
            return None
        read_back = None if self._read_back is None else self._read_back.reversed()
        return Update(self._model, [Reversed(write) for write in self.writes], None, read_back)

    def prove_written(self) -> bytes:
        """Reads back what was not yet, once the device is idle; gives the digest of all. Raises NotProven."""
        self._prove_devices(written=True)
        reloaded = b"" if self._reload is None else combine_tensors(self._reload.digests())
        return blake3(self._proofs + reloaded).digest()

    def prove_undone(self) -> None:
        """Reads back what was not yet, once the device is idle. Raises NotProven."""
        self._prove_devices(written=False)
        if self._reload is not None and not self._reload.is_undone():
            raise NotProven("a reloaded layer reads back as something else than before")

    def _prove_devices(self, *, written: bool) -> None:
        if self._read_back is None:
            return
        begun = time.perf_counter()
        wrong = self._read_back.differing(written=written)
        self.read_back_s += time.perf_counter() - begun
        if wrong is not None:
            raise NotProven(self._otherwise(self._on_devices[wrong]))

    def _otherwise(self, at: int) -> str:
        return f"write {at} of {len(self.writes)} reads back as something else"


@dataclass
class Made:
    """An update, and what the whole rank is fingerprinted as without it and with it."""

    update: Update
    routes: Routes
    before: Proof
    after: Proof | None
    """None where only the reload, in the pause, can tell."""
    tensors_before: bytes
    tensors_after: bytes
    shadow: Shadow | None

    def reversed(self) -> "Made | None":
        """The way back of what was written; None where there is none that could be written."""
        update = self.update.reversed()
        if update is None or self.after is None:
            return None
        return Made(
            update=update,
            routes=replace(self.routes, sources=()),
            before=self.after,
            after=self.before,
            tensors_before=self.tensors_after,
            tensors_after=self.tensors_before,
            shadow=self.shadow,
        )

    def drop(self) -> None:
        """Takes the shadow out of vLLM's books: its memory goes with this."""
        if self.shadow is not None:
            self.shadow.forget()


class Maker:
    """Makes an update from an image. Runs in the thread that prepares; changes nothing that serves."""

    def __init__(
        self,
        worker: Any,
        image: MappedImage,
        plan: LoadPlan | None,
        split: Split,
        *,
        whole: bool,
        base: MappedImage | None,
        device_budget_bytes: int,
        lent: LentImage | None = None,
    ) -> None:
        """`plan` is None only where nothing is direct; `whole` as for Reload; the budget is a device's, for writes.

        What is `lent` is written from there where all of a storage is written; whoever opened it closes it.
        `base` is the image that is installed, where reloading has to be rehearsed with it; whoever made it closes it.
        """
        self._worker, self._image, self._whole, self._base = worker, image, whole, base
        self._budget, self._lent, self._lent_bytes = Budget(device_budget_bytes), lent, 0
        self._plan, self._split = plan, split
        self._tensors = split.tensors
        self._model = model_of(worker)
        named = dict(self._model.named_modules(remove_duplicate=False))
        self._must = [] if plan is None else [named[name] for name in split.reasons]
        self._live = named_tensors(self._model)
        self._names = by_storage(dict(live_tensors(self._model)))
        self._after: dict[str, bytes] = {}
        device = torch.device(getattr(worker, "device", "cpu"))
        self._now, self._new = Scratch(device), Scratch(device)
        self._left: Collection[torch.nn.Module] = split.rest
        """What is left to the reload in the pause."""

    def assemble(self) -> Shadow | None:
        """What of the rest can be reloaded beforehand is; None where that is nothing. The others are left to the pause.

        Raises NoShadow, NotWhole, NotReproduced and what a loader raises.
        """
        if self._worker.vllm_config.lora_config is not None:
            raise NoShadow("the engine serves LoRA adapters")
        beyond_it = beyond(self._model, self._split.rest)
        if self._plan is None or self._tensors is None:
            if beyond_it:
                raise NoShadow(next(iter(beyond_it.values())))
            if self._base is not None:
                self._compare(self._base, self._split.rest, None)
            self._left = ()
            return self._assembled(self._image, self._split.rest, None)
        spread(self._model, self._plan, beyond_it)
        ahead = [module for module in self._split.rest if module not in beyond_it]
        tensors = self._made_from(module for module in self._must if module not in beyond_it)
        if not tensors:
            return None
        if self._base is not None:
            self._rehearse(self._base, ahead)
        shadow = self._assembled(self._image, ahead, tensors)
        self._left = [module for module in self._split.rest if module in beyond_it]
        return shadow

    def _made_from(self, modules: Iterable[torch.nn.Module]) -> set[str]:
        """The checkpoint tensors of these modules."""
        assert self._plan is not None
        wanted, named = set(modules), dict(self._model.named_modules(remove_duplicate=False))
        owned = [name for name in self._plan.forms if named[name.rpartition(".")[0]] in wanted]
        return self._plan.tensors_for(owned)

    def _assembled(
        self, image: MappedImage, of: Collection[torch.nn.Module], tensors: Collection[str] | None
    ) -> Shadow:
        shadow = Shadow(self._model, of)
        try:
            shadow.reload(self._worker, image, tensors, whole=self._whole, must=self._must)
        except Exception:
            shadow.forget()
            raise
        return shadow

    def _rehearse(self, base: MappedImage, ahead: Collection[torch.nn.Module]) -> None:
        """Assembles what is installed, and compares: of modules that keep what they computed in their tensors.

        What serves is what vLLM's loading made; that its reload makes the same is not a matter of course. Packed linear
        layers, which keep nothing that could be read, are left out. Raises NotReproduced.
        """
        unreadable = {module for module in self._must if not storages_of([module])}
        tensors = self._made_from(module for module in self._must if module in ahead and module not in unreadable)
        if not tensors:
            return
        self._compare(base, [module for module in ahead if module not in unreadable], tensors)

    def _compare(self, base: MappedImage, of: Collection[torch.nn.Module], tensors: Collection[str] | None) -> None:
        shadow = self._assembled(base, of, tensors)
        try:
            if found := shadow.differing():
                raise NotReproduced(
                    f"loading the version that is said to be installed makes something else of {found}: another is "
                    "installed, or vLLM's reload is not to be relied on here"
                )
        finally:
            shadow.forget()

    def make(self, before: Mapping[str, bytes], shadow: Shadow | None) -> Made:
        """`before` are the digests of what serves; without a shadow the rest is reloaded in the pause.

        Raises NoShadow when the shadow came to be something that cannot be written.
        """
        try:
            return self._make(before, shadow)
        except Exception:
            if shadow is not None:
                shadow.forget()
            raise

    def _make(self, before: Mapping[str, bytes], shadow: Shadow | None) -> Made:
        self._after, self._lent_bytes = dict(before), 0
        if shadow is None:
            self._left = self._split.rest
        writes = list(self._writes({} if shadow is None else shadow.storages()))
        reload = None
        if shadow is not None:
            writes.extend(
                Function(repacked.layer, "cpu_linear", repacked.function, repacked.layer.__dict__.get("cpu_linear"))
                for repacked in shadow.repacked()
            )
        must = [module for module in self._must if module in self._left]
        tensors = None if self._tensors is None else self._made_from(must)
        if self._left and (tensors is None or tensors):
            what = self._worker, self._image, self._left, tensors
            reload = Reload(*what, whole=self._whole, must=must, base=self._base)
        tensors_before, tensors_after = combine_tensors(before), combine_tensors(self._after)
        probe = Probe(self._model if shadow is None else shadow.model)
        return Made(
            update=Update(self._model, writes, reload),
            routes=self._routes(),
            before=Proof(tensors_before, Probe(self._model)),
            after=Proof(tensors_after, probe) if reload is None else None,
            tensors_before=tensors_before,
            tensors_after=tensors_after if reload is None else b"",
            shadow=shadow,
        )

    def _writes(self, assembled: Mapping[int, torch.UntypedStorage]) -> Iterator[Write]:
        copies = self._copies()
        for at, storage in storages_of(self._model.modules()).items():
            if at not in assembled and at not in copies:
                continue
            on_host = is_on_host(storage)
            now = storage if on_host else self._now.copy(storage)
            if at in assembled:
                new = assembled[at]
                pairs = [(storage_bytes(storage), storage_bytes(new))]
            else:
                new, pairs = self._planned(storage, now, copies[at])
            names = self._names.get(at, {})
            sizes = {tensor.element_size() for tensor in names.values()}
            found = difference(now, new, sizes.pop() if len(sizes) == 1 else 1)
            if found is not None:
                for name, tensor in names.items():
                    self._after[name] = digest_tensor(name, moved(tensor, new), threads=1)
                if on_host:
                    yield host_write(storage, found, pairs)
                else:
                    yield self._device_write(storage, found, () if at in assembled else copies[at])

    def _copies(self) -> dict[int, list[Copy]]:
        """Of the direct modules, by the storage that they write to."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        found: dict[int, list[Copy]] = {}
        for copy in self._plan.copies if self._plan is not None else ():
            if modules[copy.parameter.rpartition(".")[0]] in self._split.direct:
                at = self._live[copy.parameter].untyped_storage().data_ptr()
                found.setdefault(at, []).append(copy)
        return found

    def _planned(
        self, storage: torch.UntypedStorage, now: torch.UntypedStorage, copies: Sequence[Copy]
    ) -> tuple[torch.UntypedStorage, Pairs]:
        """What a storage that holds `now` is to hold, and where from all of it is to be written in the pause."""
        image = self._image.tensors
        targets = [self._live[copy.parameter].data for copy in copies]
        sources = [copy.take.of(image[copy.tensor]) for copy in copies]
        pairs = [(copy.put.of(live), source) for copy, live, source in zip(copies, targets, sources, strict=True)]
        is_cast = any(target.dtype != source.dtype for target, source in pairs)
        into = Scratch(torch.device("cpu")) if is_cast else self._new  # what is written from must last
        new = into.take(now.nbytes())
        if not are_all([target for target, _ in pairs], now.nbytes()):
            storage_bytes(new).copy_(storage_bytes(now))
        for copy, live, source in zip(copies, targets, sources, strict=True):
            copy.put.of(moved(live, new)).copy_(source)
        if is_cast:
            pairs = [(storage_bytes(storage), storage_bytes(new))]  # the pause is not for casting
        return new, pairs

    def _device_write(self, storage: torch.UntypedStorage, found: Difference, copies: Sequence[Copy]) -> Write:
        lent = {} if self._lent is None else self._lent.tensors
        pairs: Pairs = []
        if copies and all(copy.tensor in lent for copy in copies):
            pairs = [(copy.put.of(self._live[copy.parameter].data), copy.take.of(lent[copy.tensor])) for copy in copies]
        if any(target.dtype != source.dtype for target, source in pairs):
            pairs = []  # the pause is not for casting
        write = device_write(storage, found, self._budget, pairs)
        if self._lent is not None and isinstance(write, DeviceWhole) and write.is_lent:
            self._lent.on_close(write)
            self._lent_bytes += write.new_bytes
        return write

    def _routes(self) -> Routes:
        named = dict(self._model.named_modules(remove_duplicate=False))
        rest = [named[name] for name in self._split.reasons]
        return Routes(
            direct=_counted(self._split.direct),
            assembled=_counted([module for module in rest if module not in self._left]),
            reload=_counted([module for module in rest if module in self._left]),
            reasons=tuple(_told(self._split.reasons)),
            sources=() if self._lent is None else tuple(self._lent.told(self._lent_bytes)),
        )


def is_on_host(storage: torch.UntypedStorage) -> bool:
    """Whether it is compared and written where it lies."""
    return storage.device.type == "cpu"


def _counted(modules: Collection[torch.nn.Module]) -> tuple[int, int]:
    return len(modules), sum(_held_bytes(module) for module in modules)


def packed_bytes(layer: torch.nn.Module) -> int:
    """Of a layer's weight as it was loaded, which is about what a packed one takes."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    weight = get_layerwise_info(layer).restore_metadata[0].get("weight")
    return 0 if weight is None else int(weight.nbytes)


def _held_bytes(module: torch.nn.Module) -> int:
    own = (*module._parameters.values(), *module._buffers.values())
    registered = sum(tensor.nbytes for tensor in own if tensor is not None)
    return max(registered, packed_bytes(module))


def _told(reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each kind of reason: of layers that differ in their number only, the first is named."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(_NUMBERS.sub("N", reason), []).append(name)
    for names in sorted(alike.values(), key=len, reverse=True)[:REASONS_MAX]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: {reasons[names[0]]}"


def _sizes(model: torch.nn.Module) -> dict[int, int]:
    return {at: storage.nbytes() for at, storage in storages_of(model.modules()).items()}
