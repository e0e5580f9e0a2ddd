"""Unquantised experts on a CPU: vLLM packs them for its grouped product after loading, but not after a reload.

    w13, w2 as loaded --fused_experts.process_weights_after_loading--> packed, the same shapes, other bytes

vLLM's reload leaves the raw weights where packed ones are computed with, and says nothing (seen on 0.32). Here the
packing is done again, on the twin of a layer that was reloaded; in the pause it is not, and the reload is refused.
"""

from typing import Any

import torch

_METHOD = "UnquantizedFusedMoEMethod"
_PACKS = "CPUUnquantizedExperts"


def packed_experts(layer: torch.nn.Module) -> Any | None:
    """What packs this layer's experts; None when nothing does."""
    method = getattr(layer, "quant_method", None)
    if type(method).__name__ != _METHOD:
        return None
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return experts if _PACKS in {base.__name__ for base in type(experts).__mro__} else None
