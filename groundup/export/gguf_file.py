"""A model folder as one GGUF file, tensor by tensor, and the file read back as a model to see that it is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.errors import UserError
from groundup.export.check import compare, demand, logits, prompts, same_ids
from groundup.export.header import header_fields, read_config
from groundup.export.names import ROPE_FACTORS, gguf_name, interleave, undo_interleave
from groundup.export.package import gguf_package
from groundup.export.reader import GgufFile
from groundup.export.rope import rope_factors
from groundup.export.vocabulary import read_tokenizer, vocabulary_fields
from groundup.model.config import ModelConfig
from groundup.model.io import load_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer

QUANTS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's general.file_type


def write_gguf(directory: Path, quant: str, path: Path, name: str) -> dict[str, Any]:
    """Write the model of `directory` to `path`, check the file, and report.

    name: what the file calls the model. Memory: the model in fp32 and one tensor; then, alone, the file read back.
    """
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    vocabulary, notes = vocabulary_fields(tokenizer, model.config.vocab_size)
    fields = {f"{model.config.model_type}.{key}": value for key, value in header_fields(model.config).items()}
    general = {"general.name": name, "general.file_type": FILE_TYPES[quant], "general.quantization_version": 2}
    ids = prompts(tokenizer, model.config)
    before = logits(model, ids)
    types = _write(path, model, quant, {**general, **fields, **vocabulary})
    if quant.startswith("q") and "F16" in types:
        notes.append(f"{types['F16']} matrices whose rows are no multiple of 32 stayed in f16")
    del model
    file = GgufFile(path)
    after = logits(read_model(file), ids)
    found = compare(before, after)
    demand(found, before, exact=quant == "f32", where=path)
    texts = same_ids(tokenizer, read_tokenizer(file), path)
    return {
        "quant": quant,
        "bytes": path.stat().st_size,
        "tensors": types,
        "pre_tokenizer": vocabulary["tokenizer.ggml.pre"],
        "notes": notes,
        "check": {"prompts": len(ids), **found.as_dict(), "texts_with_equal_ids": texts},
    }


def read_model(file: GgufFile) -> Transformer:
    """The model of a GGUF, in fp32. UserError: see `read_config`, `tensor_shapes`, `read_tensor`."""
    config = read_config(file)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = tensor_shapes(file, config)
    state = {name: read_tensor(file, name, config, shape) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def tensor_shapes(file: GgufFile, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (Hugging Face's) and shape of every tensor of the model. UserError where the file has others."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    outside = {gguf_name(name) for name in shapes}
    missing = sorted(outside - file.tensors.keys())
    if missing:
        raise UserError(file.path, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the file again")
    unknown = sorted(file.tensors.keys() - outside - {ROPE_FACTORS})
    if unknown:
        raise UserError(file.path, f"holds {unknown[0]}, which {config.model_type} has not", "use another model")
    return shapes


def read_tensor(file: GgufFile, name: str, config: ModelConfig, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that Hugging Face calls `name`, fp32. UserError where its shape is not the one that config gives."""
    array = file.array(gguf_name(name))
    if array.shape != shape:
        why = f"{gguf_name(name)} is {tuple(array.shape)}, its header says {shape}"
        raise UserError(file.path, why, "fetch the file again")
    return torch.from_numpy(np.ascontiguousarray(undo_interleave(name, array, config)))


def _write(path: Path, model: Transformer, quant: str, fields: dict[str, Any]) -> dict[str, int]:
    """Write fields, then tensors one at a time; returns how many there are of each type."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, model.config.model_type)
    for key, value in fields.items():
        _add_field(writer, key, value)
    kinds: dict[str, int] = {}
    for name, array in _arrays(model):
        kind = gguf.GGMLQuantizationType[_type_of(name, array, quant)]
        size = int(np.prod(gguf.quant_shape_to_byte_shape(array.shape, kind)))
        writer.add_tensor_info(name, array.shape, array.dtype, size, raw_dtype=kind)
        kinds[kind.name] = kinds.get(kind.name, 0) + 1
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with np.errstate(over="ignore"):  # a weight too large for f16 becomes infinite, which the check finds
            for name, array in _arrays(model):
                kind = gguf.GGMLQuantizationType[_type_of(name, array, quant)]
                writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(array), kind))
    finally:
        writer.close()
    return dict(sorted(kinds.items()))


def _arrays(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under llama.cpp's name with its rows in llama.cpp's order, as views where that is possible."""
    factors = rope_factors(model.config)
    if factors is not None:
        yield ROPE_FACTORS, factors
    for name, tensor in model.state_dict().items():
        yield gguf_name(name), interleave(name, tensor.detach().float().numpy(), model.config)


def _type_of(name: str, array: np.ndarray, quant: str) -> str:
    """As llama.cpp's tools choose: vectors in fp32; embedding and head no coarser than 8 bits; f16 where 32 does not
    divide the rows."""
    if array.ndim == 1:
        return "F32"
    if not quant.startswith("q"):
        return QUANTS[quant]
    if array.shape[-1] % 32:
        return "F16"
    return "Q8_0" if name in ("token_embd.weight", "output.weight") else QUANTS[quant]


def _add_field(writer: Any, key: str, value: Any) -> None:
    """One field, in the type that llama.cpp expects of such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
