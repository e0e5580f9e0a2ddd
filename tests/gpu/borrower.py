"""Another process that borrows GPU memory, told what to do line by line: prints one answer a line.

python -m tests.gpu.borrower HANDLE
"""

import sys
import time

import torch

from hotweights.transports.cuda_ipc import Borrowed, CudaError


def main(handle: bytes) -> None:
    torch.zeros(1, device="cuda")
    held: Borrowed | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            match command:
                case "open":
                    held = Borrowed(0, handle)
                    print(held.size, flush=True)
                case "close":
                    assert held is not None
                    held.close()
                    print("closed", flush=True)
                case "same":
                    # Whether every byte from `offset` on is `value`.
                    assert held is not None
                    offset, size, value = map(int, arguments)
                    mine = torch.empty(size, dtype=torch.uint8, device="cuda")
                    mine.copy_(torch.as_tensor(held.as_array(offset, size), device="cuda"))
                    print(bool((mine == value).all()), flush=True)
                case "copying":
                    # Copies until the end of this process's input, or for so many seconds.
                    assert held is not None
                    theirs = torch.as_tensor(held.as_array(0, held.size), device="cuda")
                    mine = torch.empty_like(theirs)
                    print("begun", flush=True)
                    ends = time.monotonic() + float(arguments[0])
                    while time.monotonic() < ends:
                        mine.copy_(theirs)
                        torch.cuda.synchronize()
                    print("ended", flush=True)
        except CudaError as error:
            print(error.name, flush=True)


if __name__ == "__main__":
    main(bytes.fromhex(sys.argv[1]))
