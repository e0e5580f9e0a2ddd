"""An update that a rank has made ready, with all that it holds until it is dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotweights.adapters import kv_cache
from hotweights.adapters.jobs import Job, quietly
from hotweights.adapters.lent import LentImage
from hotweights.adapters.mapped import MappedImage, TensorSpec
from hotweights.adapters.update import Made

PROBE_SLICE_S = 0.005  # a serving engine waits at most about this long for one poll


class Prepared:
    """An update that was made ready, and the image it is from."""

    def __init__(
        self,
        folder: Path,
        image: MappedImage,
        made: Made,
        specs: Mapping[str, TensorSpec],
        base: MappedImage | None = None,
        lent: LentImage | None = None,
    ) -> None:
        """`image` is what the writes read from, `specs` are of what is served after it, `base` is what is served.

        `lent` is what they read from instead, as far as it goes.
        """
        self.folder = folder
        self.base = base
        self.lent = lent
        self.image = image
        self.specs = specs
        self._made: Made | None = made
        self.applied = False
        self.is_way_back = False
        self.specs_before: Mapping[str, TensorSpec] | None = None
        self._look: Job | None = None

    @property
    def made(self) -> Made:
        """Until `drop`."""
        assert self._made is not None
        return self._made

    def drop(self) -> None:
        """Frees its memory, in whatever thread this is."""
        self.give_back()
        made, self._made = self.made, None
        made.drop()
        del made
        if self.base is not None:
            self.base.close()

    def give_back(self) -> None:
        """What was lent; what reads from it reads from the image instead."""
        lent, self.lent = self.lent, None
        if lent is not None:
            lent.close()

    def way_back(self, folder: Path) -> "Prepared | None":
        """Of one that was applied, as one to apply, of the image in `folder`; None where there is none.

        It reads from the image that is served now, which stays staged. The way back of a way back would read from one
        that is not served any longer: there is none.
        """
        back = self.made.reversed() if self.applied and not self.is_way_back else None
        if back is None or self.specs_before is None:
            return None
        found = Prepared(folder, self.image, back, self.specs_before)
        found.is_way_back = True
        return found

    @property
    def before(self) -> bytes:
        """The fingerprint of before. After `ready`."""
        return self.made.before.fingerprint

    @property
    def expected(self) -> bytes:
        """The fingerprint of after; empty where only the window can tell. After `ready`."""
        return self.made.after.fingerprint if self.made.after is not None else b""

    def look_at_caches(self, runner: Any) -> None:
        """Begins to, last of all: what is computed after that nobody looks at."""
        self._look = Job("caches", lambda: quietly(lambda: kv_cache.may_be_spoilt(runner)))

    @property
    def caches_spoilt(self) -> bool:
        """Whether the apply clears the KV cache. After `ready`."""
        return self._look is not None and bool(self._look.result())

    def ready(self) -> bool:
        """Goes on with the probes for one slice; True once the fingerprints are known and the caches looked at."""
        if self._look is not None and not self._look.done:
            return False
        after = self.made.after
        return self.made.before.run(PROBE_SLICE_S) and (after is None or after.run(PROBE_SLICE_S))
