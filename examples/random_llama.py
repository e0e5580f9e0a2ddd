"""Random Llama-like checkpoints: what tests, demos and benchmarks swap, since no model hub is needed.

usage: python examples/random_llama.py FOLDER SEED [tiny|small|demo|large]
"""

import sys
from pathlib import Path
from typing import Any

# "demo" is about 100 MB in bfloat16, "large" about 890 MB: the sizes the documented figures were measured on.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 512},
    "demo": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 512},
    "large": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 15, "vocab_size": 8192},
}
VOCABULARY = 512


def make_checkpoint(folder: Path | str, seed: int, size: str = "tiny", *, tied: bool = False) -> Path:
    """Writes a bfloat16 checkpoint with a word-level tokenizer ("t3 t4 t5"); the seed fixes every weight."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = SIZES[size]["hidden_size"] // 32
    config = LlamaConfig(
        **SIZES[size],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
        # Wider than the default 0.02, so that greedy outputs vary with the prompt and the seed.
        initializer_range=0.08,
    )
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    _save_tokenizer(Path(folder))
    return Path(folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: Any = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )


if __name__ == "__main__":
    print(make_checkpoint(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4]))
