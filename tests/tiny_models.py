"""Random tiny checkpoints of many architectures, without tokenizers: engines are asked in tokens."""

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    **{"num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64},
    **{"qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
_EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# What each is here for: what its loader does that others' do not. By name, the Transformers classes and more settings.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # experts
    "qwen3-moe": ("Qwen3Moe", _EXPERTS),
    "deepseek": ("DeepseekV2", _LATENT),  # latent attention, of the one size that the CPU has a kernel for
    "llama": ("Llama", {}),  # q, k and v, gate and up are fused
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),  # biases
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),  # norms of q and k
    "gemma2": ("Gemma2", {"head_dim": 32}),
    "gemma3": ("Gemma3", {"head_dim": 32}),
    "phi3": ("Phi3", {"pad_token_id": 0}),  # fused in the checkpoint
    "opt": ("OPT", {"ffn_dim": 256, "word_embed_proj_dim": 128}),  # learned positions, biases
    "llama-padded": ("Llama", {"vocab_size": 500}),  # vLLM pads vocabularies to multiples of 64
}


def make_tiny_model(folder: Path, architecture: str, seed: int) -> Path:
    """A bfloat16 checkpoint."""
    import torch
    import transformers

    family, settings = ARCHITECTURES[architecture]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**{**_COMMON, **settings})
    torch.manual_seed(seed)
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_int8_model(folder: Path, seed: int) -> Path:
    """A Llama whose linear layers are int8 with a scale for each output (compressed-tensors, W8A8)."""
    import torch
    from safetensors.torch import load_file, save_file

    make_tiny_model(folder, "llama", seed)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[name + "_scale"] = scale.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_int4_model(folder: Path, seed: int) -> Path:
    """A Llama whose linear layers are of four bits with a scale for 32 inputs and an output each (GPTQ)."""
    import torch
    from safetensors.torch import load_file, save_file

    group = 32
    make_tiny_model(folder, "llama", seed)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        outputs, inputs = tensors.pop(name).shape
        layer = name.removesuffix(".weight")
        whole = 1 << 31
        tensors[f"{layer}.qweight"] = torch.randint(-whole, whole - 1, (inputs // 8, outputs), dtype=torch.int32)
        tensors[f"{layer}.qzeros"] = torch.full((inputs // group, outputs // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{layer}.scales"] = (torch.rand(inputs // group, outputs) * 0.01 + 0.001).to(torch.bfloat16)
        tensors[f"{layer}.g_idx"] = (torch.arange(inputs) // group).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_eagle(folder: Path, seed: int, *, own_embedding: bool = True) -> Path:
    """A Llama with an EAGLE head as its draft, which holds the target's embedding, its own or none of its own.

    vLLM gives target and draft one embedding where they are equal, or the draft has none.
    """
    import torch
    from safetensors.torch import load_file, save_file

    make_tiny_model(folder, "llama", seed)
    draft = make_tiny_model(folder / "draft", "llama", 10 * seed)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(draft / "model.safetensors").items()}
    left_out = ("layers.1.", "lm_head.", "norm.", "layers.0.input_layernorm.", "embed_tokens.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    width = _COMMON["hidden_size"]
    tensors["fc.weight"] = (torch.randn(width, 2 * width) * 0.02).to(torch.bfloat16)
    if own_embedding:
        tensors["embed_tokens.weight"] = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})
    config = json.loads((draft / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (draft / "config.json").write_text(json.dumps(config))
    return folder
