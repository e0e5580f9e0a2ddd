"""Another process that lends GPU memory filled with one value, until its input ends. Prints the handle.

python -m tests.gpu.lender SIZE VALUE
"""

import sys

import torch

from hotweights.transports.cuda_ipc import Lent


def main(size: int, value: int) -> None:
    torch.zeros(1, device="cuda")
    memory = Lent(0, size)
    torch.as_tensor(memory.as_array(0, memory.size), device="cuda").fill_(value)
    torch.cuda.synchronize()
    print(memory.handle.hex(), flush=True)
    sys.stdin.read()
    memory.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
