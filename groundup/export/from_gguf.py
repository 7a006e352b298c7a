"""A GGUF becomes a model folder: weights dequantised, tokenizer and template rebuilt."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from groundup.errors import UserError
from groundup.export.check import prompts
from groundup.export.gguf_file import read_tensor, tensor_shapes
from groundup.export.header import read_config
from groundup.export.place import refuse_existing, staged
from groundup.export.reader import GgufFile
from groundup.export.shards import MAX_SHARD_BYTES, write_shards
from groundup.export.vocabulary import read_tokenizer
from groundup.files import write_json
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer


def import_gguf(file: str | Path, output: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, Any]:
    """Make a stock model folder (fp32 safetensors, tokenizer, template) of a GGUF, and report.

    Any type that the gguf package can dequantise comes in. Memory: one shard and one tensor; then the model, to see
    that it computes. Raises UserError: not a GGUF, damaged, an architecture or tokenizer that is not ours, an output
    that exists; nothing is left behind then.
    """
    output = Path(output)
    refuse_existing(output)
    source = GgufFile(file)
    config, tokenizer = read_config(source), read_tokenizer(source)
    shapes = tensor_shapes(source, config)
    if tokenizer.vocab_size > config.vocab_size:
        why = f"has {tokenizer.vocab_size} tokens, but only {config.vocab_size} embeddings"
        raise UserError(source.path, why, "fetch the file again")
    with staged(output) as folder:
        folder.mkdir()
        tokenizer.save(folder)
        described = config.to_hf_dict()
        write_json(folder / "config.json", described)
        ends = {name: described[name] for name in ("bos_token_id", "pad_token_id")}
        stops = tokenizer.stop_ids
        write_json(folder / "generation_config.json", {**ends, "eos_token_id": stops if len(stops) > 1 else stops[0]})
        sizes = {name: 4 * prod(shape) for name, shape in shapes.items()}

        def make(name: str) -> torch.Tensor:
            return read_tensor(source, name, config, shapes[name])

        files = write_shards(folder, sizes, make, max_shard_bytes)
        tokens = _check(folder, source)
    return {
        "output": str(output),
        "architecture": config.model_type,
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "tensors": source.types(),
        "pre_tokenizer": source.get("tokenizer.ggml.pre"),
        "chat_template": bool(tokenizer.chat_template),
        "files": files,
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "check": {"tokens": tokens, "finite": True},
    }


def _check(folder: Path, source: GgufFile) -> int:
    """Load the new folder and run it; the number of tokens that it gave numbers for."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = prompts(tokenizer, model.config)
    with torch.no_grad():
        for prompt in ids:
            if not model(torch.tensor([prompt])).isfinite().all():
                raise UserError(source.path, "its weights compute no numbers", "fetch the file again")
    return sum(map(len, ids))
