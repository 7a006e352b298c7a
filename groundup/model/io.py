"""How does a model come from and go to disk? As a stock Hugging Face folder, never as a pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from groundup.errors import UserError
from groundup.files import explain, write_json
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSORS_AT_ONCE = 16


def load_model(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a stock folder (config.json, one or several safetensors), in eval mode.

    dtype None: as stored, but fp32 on a CPU, where half precision is many times slower without special units.
    Raises UserError: no folder, unsupported architecture, a missing, damaged or wrongly shaped tensor.
    """
    directory = Path(directory)
    config = ModelConfig.from_dir(directory)
    with torch.device("meta"), _without_initialising():
        model = Transformer(config)
    wanted = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(directory):
        tensors.update(_read(path, wanted, torch.device(device), dtype))
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise UserError(directory, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the model again")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).eval()


@contextmanager
def _without_initialising() -> Iterator[None]:
    """Leave out the layers' own initialisation: on meta tensors it does nothing, and loads 80 MB of Python to do so."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    before = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda layer: None
        yield
    finally:
        for kind, reset in zip(kinds, before, strict=True):
            kind.reset_parameters = reset


def save_model(model: Transformer, directory: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each whole or not at all.

    The weights keep the module's dtype. Tied heads are stored once, as transformers does. UserError: a full disk, a
    folder that may not be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, directory) from error
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = model.config.to_hf_dict(dtype=str(model.head_weight.dtype).removeprefix("torch."))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _replace_weights(directory / WEIGHTS, state)
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"_from_model_config": True, **ends})


def _replace_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write beside `path`, flush to disk, rename: a reader, or a run killed at any instant, finds old or new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # how safetensors passes on an OSError
        cause = error if isinstance(error, OSError) else OSError(int(code[1]) if code else 0, str(error))
        raise explain(cause, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors of a folder: one, or those that its index names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise UserError(directory, f"neither {WEIGHTS} nor {INDEX} here", "save or fetch the model as safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(index, "not a safetensors index", "fetch the model again") from None
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise UserError(index, f"names {name}, which is not in the folder", "fetch the model again")
    return [directory / name for name in names]


def _read(
    path: Path, wanted: dict[str, torch.nn.Parameter], device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The wanted tensors of one file, checked against the model's shapes and moved one at a time.

    The file is opened anew every few tensors: what was read of a mapped file counts as memory until it is closed.
    """
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for start in range(0, len(names), TENSORS_AT_ONCE):
            with safe_open(path, framework="pt") as file:
                for name in names[start : start + TENSORS_AT_ONCE]:
                    if (name == "lm_head.weight" and name not in wanted) or name.endswith("rotary_emb.inv_freq"):
                        continue  # a tied head stored twice; a buffer of old checkpoints
                    found[name] = _tensor(file, path, name, wanted, device, dtype)
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"damaged or not safetensors ({error})", "fetch or save the model again") from None
    return found


def _tensor(
    file: Any,
    path: Path,
    name: str,
    wanted: dict[str, torch.nn.Parameter],
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    if name not in wanted:
        raise UserError(path, f"holds {name}, which this architecture has not", "check its config.json")
    shape = tuple(file.get_slice(name).get_shape())
    if shape != tuple(wanted[name].shape):
        expected = tuple(wanted[name].shape)
        raise UserError(path, f"{name} is {shape}, config.json says {expected}", "fetch the model again")
    tensor = file.get_tensor(name)
    half_on_cpu = device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
    target = dtype or (torch.float32 if half_on_cpu else tensor.dtype)
    # clone: a tensor that still lives in the mapped file would change when the file does
    return tensor.to(device, target) if target != tensor.dtype else tensor.clone().to(device)
