"""Parameters of a Llama of 8 billion, bf16: the shapes that vLLM holds them in, and the time that a device takes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

WIDTH, INNER, HEADS, VOCABULARY, LAYERS = 4096, 14336, 6144, 128256, 32


def shapes(layers: int = LAYERS) -> Iterator[tuple[str, tuple[int, ...]]]:
    """By name; 16.06 GB at 32 layers."""
    yield "embed", (VOCABULARY, WIDTH)
    for layer in range(layers):
        yield f"{layer}.qkv", (HEADS, WIDTH)
        yield f"{layer}.o", (WIDTH, WIDTH)
        yield f"{layer}.gate_up", (2 * INNER, WIDTH)
        yield f"{layer}.down", (WIDTH, INNER)
        yield f"{layer}.norms", (2 * WIDTH,)
    yield "norm", (WIDTH,)
    yield "head", (VOCABULARY, WIDTH)


def module(layers: int) -> Any:
    """On the GPU, of random bits."""
    import torch

    made = torch.nn.Module()
    for name, shape in shapes(layers):
        bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda")
        values = torch.nn.Parameter(bits.view(torch.bfloat16), requires_grad=False)
        made.register_parameter(name.replace(".", "_"), values)
    return made


def timed(work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    import torch

    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def no_gpu() -> str:
    """Why what needs a GPU is not measured here; empty where it is."""
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device here"
