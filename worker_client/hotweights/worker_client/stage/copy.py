"""An image from a folder of this node into the stage: every bucket verified where it lands."""

from hotweights.worker_client.image.digests import on_all_cores
from hotweights.worker_client.image.errors import FolderChanged
from hotweights.worker_client.image.manifest import Image
from hotweights.worker_client.image.reader import BucketReader
from hotweights.worker_client.stage.partial import Partial, Progress


def copy_folder(partial: Partial, image: Image, progress: Progress) -> None:
    """Fills what is missing, on all cores. Raises FolderChanged: the folder must not be offered any more."""
    reader = BucketReader()

    def copy(index: int, _: memoryview) -> None:
        bucket = partial.manifest.buckets[index]
        data = reader.read_range(image, bucket.file, bucket.offset, bucket.size_bytes)
        with partial.view(index) as place:
            place[:] = data
        if not partial.matches(index):  # same stamps, other bytes
            raise FolderChanged(image.folder, partial.manifest.files[bucket.file].name)
        partial.mark_good(index)
        progress(partial.bytes_done, partial.bytes_total)

    on_all_cores(sorted(partial.missing), copy)
