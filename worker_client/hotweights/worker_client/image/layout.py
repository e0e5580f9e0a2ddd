"""Where parts of an image's files lie in GPU memory that is lent: after a seal, together what is so in a file."""

import secrets

from hotweights.v1 import agent_service_pb2 as pb

SEAL_BYTES = 64
ALIGNED_BYTES = 256


class Layout:
    """Of memory on one GPU, part by part. `told` is what borrowers need to know, but for the handle."""

    def __init__(self, device_uuid: str) -> None:
        self.told = pb.DeviceMemory(device_uuid=device_uuid, seal=secrets.token_bytes(SEAL_BYTES))
        self.size_bytes = SEAL_BYTES

    def add(self, file: str, file_offset: int, size: int) -> int:
        """Where in the memory a part of a file is to lie. Parts come in the order in which the file has them."""
        last = self.told.ranges[-1] if self.told.ranges else None
        if last is not None and (last.file, last.file_offset + last.size_bytes) == (file, file_offset):
            last.size_bytes += size
        else:
            # As far from an aligned address as the file has it from its beginning, which is as far as its types need.
            start = -(-self.size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES + file_offset % ALIGNED_BYTES
            last = self.told.ranges.add(file=file, file_offset=file_offset, memory_offset=start, size_bytes=size)
        at: int = last.memory_offset + file_offset - last.file_offset
        self.size_bytes = at + size
        return at
