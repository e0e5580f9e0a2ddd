"""vLLM on a CPU as where it packs nothing: without AVX-512 and without AMX."""


def keep_plain() -> None:
    """Linear layers that are made in this process from now on keep their weights as they are."""
    import torch
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
    torch.cpu._is_amx_tile_supported = lambda: False
