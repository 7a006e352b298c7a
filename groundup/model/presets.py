"""Which sizes are worth having? All are stock qwen3 (QK-norm, no biases) with tied embeddings.

Head dims stay within {32, 64, 80, 96, 128}: the ones that every engine we export to has kernels for.
"""

from __future__ import annotations

import re

from groundup.errors import UserError
from groundup.model.config import ModelConfig

# name: (hidden_size, layers, heads, kv heads, head_dim, intermediate_size); sizes in the comments at vocabulary 6,400
PRESETS: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (128, 4, 4, 2, 32, 384),  # 1.6M (1.05M at vocabulary 2,048): seconds on a laptop
    "5m": (256, 4, 4, 2, 64, 768),  # 4.8M
    "small-26m": (512, 8, 8, 2, 64, 1408),  # 25.8M, the shape of MiniMind2-Small
    "base-64m": (768, 8, 8, 4, 96, 2432),  # 63.9M
    "base-104m": (768, 16, 8, 2, 96, 2048),  # 104.0M, the shape of MiniMind2
}


def preset(name: str, vocab_size: int = 6400) -> ModelConfig:
    """The config of a named size, of `depth-N` or `depth-N-width-W` (see scaled). UserError for an unknown name."""
    if match := re.fullmatch(r"depth-(\d+)(?:-width-(\d+))?", name):
        return scaled(int(match[1]), vocab_size, int(match[2]) if match[2] else None)
    if name not in PRESETS:
        known = f"one of {', '.join(PRESETS)}, depth-N, depth-N-width-W, or a model folder"
        raise UserError(f"model={name}", "no such preset", known)
    width, layers, heads, kv_heads, head_dim, ffn = PRESETS[name]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )


def scaled(depth: int, vocab_size: int = 6400, width: int | None = None) -> ModelConfig:
    """One dial: `depth` layers, 64 units of width a layer (aspect ratio as in nanochat), the rest derived.

    2 -> 128 wide, 4 -> 256, 8 -> 512, 12 -> 768. The ffn is 8/3 of the width (SwiGLU has three matrices where a
    plain ffn of 4 x width has two), rounded up to a multiple of 64; half as many kv heads as heads where they divide.
    width: another one, for slim students.
    """
    if depth < 1:
        raise UserError(f"depth={depth}", "a model has at least one layer", "choose 1 or more")
    width = 64 * max(depth, 2) if width is None else width
    if width < 32:
        raise UserError(f"width={width}", "a head is 32 wide", "choose 32 or more")
    head_dim = 32 if width <= 256 else 64  # slim models want heads more than they want them wide
    heads = width // head_dim
    group = next((size for size in (2, 3) if heads % size == 0), 1)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-width * 8 // (3 * 64)) * 64,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // group,
        head_dim=head_dim,
    )
