"""Random checkpoints of a model that hears: Qwen2-Audio, for its preprocessing needs nothing that is not installed."""

from pathlib import Path
from typing import Any

VOCABULARY = 509
MARKS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")  # their ids follow the vocabulary's
MEL_BINS = 32


def make_audio_checkpoint(folder: Path, ears: int) -> Path:
    """A bfloat16 checkpoint whose audio encoder and projector are drawn by the seed `ears`; the rest is always one."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    audio: Any = Qwen2AudioEncoderConfig(
        num_mel_bins=MEL_BINS, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128, d_model=64
    )
    text: Any = Qwen2Config(
        vocab_size=VOCABULARY + len(MARKS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=VOCABULARY)
    model: Any = Qwen2AudioForConditionalGeneration(config).to(torch.bfloat16)
    torch.manual_seed(ears)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_tower" in name or "projector" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    # Published checkpoints have the text model's names one level higher than Transformers 5 writes them.
    weights = folder / "model.safetensors"
    published = {
        name.replace("language_model.model.model.", "language_model.model."): tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(published, weights, {"format": "pt"})
    processor: Any = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS), _tokenizer())
    processor.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {f"t{n}": n for n in range(VOCABULARY)} | {mark: VOCABULARY + n for n, mark in enumerate(MARKS)}
    words: Any = Tokenizer(models.WordLevel(ids, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=list(MARKS), **special)
