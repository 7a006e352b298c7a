"""A clean Hugging Face folder: weights in shards, config, tokenizer, template, and nothing of the training run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from groundup.errors import UserError
from groundup.export.check import compare, demand, logits, prompts
from groundup.export.shards import write_shards
from groundup.files import write_json
from groundup.model.io import load_model
from groundup.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write_hf(directory: Path, quant: str, folder: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Write the model of `directory` to `folder`, load it with transformers to check it, and report.

    The logits of transformers must be ours on the same weights; how far the type moved them from the original is
    reported. Memory: two models in fp32.
    """
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    ids = prompts(tokenizer, model.config)
    before, dtype = logits(model, ids), DTYPES[quant]
    folder.mkdir()
    tokenizer.save(folder)
    described = model.config.to_hf_dict(dtype=str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", described)
    habits = directory / "generation_config.json"
    if habits.is_file():
        shutil.copyfile(habits, folder / habits.name)
    else:
        write_json(folder / habits.name, {k: described[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    files = _write_weights(folder, model.state_dict(), dtype, max_shard_bytes)
    del model
    found = compare(before, _checked_logits(folder, ids, tokenizer))
    demand(found, before, exact=quant == "f32", where=folder)
    return {
        "quant": quant,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "files": files,
        "notes": [],
        "check": {"prompts": len(ids), **found.as_dict(), "loaded_with": "transformers"},
    }


def _write_weights(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, max_shard_bytes: int) -> list[str]:
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in state.items()}
    return write_shards(folder, sizes, lambda name: state[name].to(dtype).contiguous(), max_shard_bytes)


def stored_quant(directory: Path) -> str:
    """The type that the folder's config.json says its weights have; f32 where it says none that goes out."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "f32"  # whoever loads the model says what is wrong with the folder
    named = config.get("dtype") or config.get("torch_dtype") if isinstance(config, dict) else None
    return next((quant for quant, dtype in DTYPES.items() if str(dtype) == f"torch.{named}"), "f32")


def _checked_logits(folder: Path, ids: list[list[int]], tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Our logits on the written weights, after transformers gave the same, and its tokenizer the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    ours = logits(load_model(folder), ids)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    theirs = logits(lambda batch: stock(batch).logits, ids)
    demand(compare(ours, theirs), ours, exact=True, where=folder)
    text = "The copy reads this as 4 + 5 = 9."
    read = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, add_special_tokens=False).input_ids
    if read != tokenizer.encode(text):
        raise UserError(folder, "transformers reads text otherwise", "please report the model's tokenizer.json")
    return ours
