"""What can go wrong in a stage, as refusals that say what to do."""

from pathlib import Path

import grpc

from hotweights.wire.errors import Refused


def size_text(size_bytes: int) -> str:
    """Bytes for a person: 1536 is "1.5 KiB"."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class StageFull(Refused):
    """There is no room for the image, with nothing left that may go."""

    def __init__(self, root: Path, needed_bytes: int, free_bytes: int, limited_by: str) -> None:
        hint = "release an image, or give the stage more room"
        if limited_by == "stage":
            hint += " (a pod's /dev/shm is 64 MiB unless it mounts a memory-backed volume)"
        super().__init__(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "STAGE_FULL",
            f"the stage {root} needs {size_text(needed_bytes)} ({needed_bytes} bytes) more for this image and has "
            f"{size_text(free_bytes)} ({free_bytes} bytes) free, limited by {limited_by}; {hint}",
            stage=str(root),
            needed_bytes=str(needed_bytes),
            free_bytes=str(free_bytes),
            limited_by=limited_by,
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class StageTaken(Refused):
    """Another agent uses the stage."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            grpc.StatusCode.ALREADY_EXISTS,
            "STAGE_TAKEN",
            f"another agent uses the stage {root}; one agent a node, or set HOTWEIGHTS_STAGE_DIR",
            stage=str(root),
        )


class StageUnsafe(Refused):
    """The stage's folder belongs to somebody else or is open to others."""

    def __init__(self, root: Path, why: str) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            "STAGE_UNSAFE",
            f"the stage {root} cannot be trusted: {why}; remove it or set HOTWEIGHTS_STAGE_DIR",
            stage=str(root),
        )


class NotStaged(Refused):
    """The image is not in the stage, whole and verified."""

    def __init__(self, digest: bytes) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_STAGED",
            f"image {digest.hex()[:16]} is not staged on this node; stage it first",
            manifest_digest=digest.hex(),
        )


class ImageAltered(Refused):
    """Somebody wrote to a staged image after its bytes were verified; it is held no longer."""

    def __init__(self, digest: bytes, file: str) -> None:
        super().__init__(
            grpc.StatusCode.FAILED_PRECONDITION,
            "IMAGE_ALTERED",
            f"image {digest.hex()[:16]} was altered in the stage after it was verified ({file}); nothing of it is "
            "used, and the next update fetches what is wrong",
            manifest_digest=digest.hex(),
            file=file,
        )


class SourcesFailed(Refused):
    """No source gave the whole image; `why` holds a line for each."""

    def __init__(self, digest: bytes, why: list[str]) -> None:
        told = "; ".join(why) if why else "none was named, and this node does not have it"
        super().__init__(
            grpc.StatusCode.UNAVAILABLE if why else grpc.StatusCode.FAILED_PRECONDITION,
            "SOURCES_FAILED" if why else "NO_SOURCE",
            f"image {digest.hex()[:16]} has no source that works: {told}",
            manifest_digest=digest.hex(),
        )
