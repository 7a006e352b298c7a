"""One door for every way out: check what was asked, grow the result beside its place, say what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundup.errors import UserError
from groundup.export.gguf_file import QUANTS, write_gguf
from groundup.export.hf import DTYPES, stored_quant, write_hf
from groundup.export.ollama import write_ollama
from groundup.export.place import refuse_existing, staged
from groundup.export.shards import MAX_SHARD_BYTES
from groundup.model.config import ModelConfig

FORMATS = {"gguf": tuple(QUANTS), "ollama": tuple(QUANTS), "hf": tuple(DTYPES)}


def export(
    directory: str | Path,
    to: str,
    quant: str | None,
    output: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model folder `directory` in another form to `output`, check that it is the same model, and report.

    to: gguf (one file), ollama (a folder with a GGUF and a Modelfile) or hf (a clean stock folder). quant: f32, f16,
    q8_0, q4_0, or for hf f32, f16, bf16; None: f16, or for hf the stored type. max_shard_bytes: of a safetensors file.
    Raises UserError: no model there, an unknown form, an output that exists, a model or tokenizer that the form cannot
    hold, a full disk; nothing is left behind then.
    """
    directory, output = Path(directory), Path(output)
    if to not in FORMATS:
        raise UserError("--to", f"{to!r} is not a form that we write", f"use {', '.join(FORMATS)}")
    quant = quant or (stored_quant(directory) if to == "hf" else "f16")
    if quant not in FORMATS[to]:
        raise UserError("--quant", f"{to} has no {quant!r}", f"use {', '.join(FORMATS[to])}")
    if max_shard_bytes < 1:
        raise UserError("--max-shard-size", f"{max_shard_bytes} bytes hold nothing", "use 1 or more")
    refuse_existing(output)
    ModelConfig.from_dir(directory)  # says what is wrong with the folder before anything is made
    name = directory.resolve().name
    with staged(output) as place:
        if to == "gguf":
            report = write_gguf(directory, quant, place, name)
        elif to == "ollama":
            report = write_ollama(directory, quant, place, name)
        else:
            report = write_hf(directory, quant, place, max_shard_bytes)
    return {"output": str(output), "format": to, **report}
