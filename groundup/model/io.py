"""How does a model come from and go to disk? As a stock Hugging Face folder, never as a pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from groundup.errors import UserError
from groundup.files import explain, write_json
from groundup.model.config import ModelConfig, NotNative, read_json
from groundup.model.foreign import Foreign, load_foreign, quiet
from groundup.model.foreign_config import ForeignConfig
from groundup.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLES = (".bin", ".pth", ".pt")
TENSORS_AT_ONCE = 16


def read_config(directory: str | Path) -> ModelConfig | ForeignConfig:
    """The shape of a folder's model: ours where we compute it ourselves, else transformers'. UserError: neither."""
    directory = Path(directory)
    _refuse_pickles(directory)
    try:
        return ModelConfig.from_dir(directory)
    except NotNative:
        if not read_json(directory).get("model_type"):
            raise
        return ForeignConfig.from_dir(directory)


def is_scorer(directory: str | Path) -> bool:
    """Whether a folder's model scores answers (a reward model; scored.py) and writes none."""
    names = read_json(directory).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def load_model(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a stock folder (config.json, one or several safetensors), in eval mode; `describe` says whose it is.

    Llama, Qwen2 and Qwen3 we compute ourselves; any other causal architecture is a Foreign, which has Transformer's
    face. dtype None: as stored, but fp32 on a CPU, where half precision is many times slower without special units.
    Raises UserError: no folder, unsupported architecture, a missing, damaged or wrongly shaped tensor.
    """
    directory, device = Path(directory), torch.device(device)
    config = read_config(directory)
    if is_scorer(directory):
        fix = "name a model that writes; this one is for the reward of a recipe, --verifier, and groundup serve"
        raise UserError(directory, "holds a reward model: it scores answers and writes none", fix)
    if isinstance(config, ForeignConfig):
        weight_files(directory)
        return cast(Transformer, load_foreign(directory, device, dtype))
    model = empty(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        tensors.update(read_tensors(path, wanted, device, dtype))
    settled = _settle_head(config, tensors)
    if settled is not config:
        model = empty(settled)
    missing = sorted(dict(model.named_parameters()).keys() - tensors.keys())
    if missing:
        raise UserError(directory, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the model again")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).eval()


def describe(model: nn.Module) -> str:
    """Which way was taken, in a line: "opt: computed by transformers"."""
    config, model = cast(Any, model.config), getattr(model, "trunk", model)
    if isinstance(model, Foreign):
        return "; ".join([f"{config.model_type}: computed by transformers", *model.notes])
    return f"{config.model_type}: computed by groundup"


def _settle_head(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> ModelConfig:
    """A tied head is stored once, twice (pickles of old did), or under the head's name alone; where both are there and
    differ, config.json is wrong, and they are two. As transformers has it."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config
    head = tensors.pop(HEAD)
    if not torch.equal(tensors.setdefault(EMBEDDING, head), head):
        tensors[HEAD] = head
        return replace(config, tie_word_embeddings=False)
    return config


def empty(config: ModelConfig) -> Transformer:
    """A model without memory, to be given its tensors.

    Without the layers' own initialisation: on meta tensors it does nothing, and loads 80 MB of Python to do so.
    """
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    before = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda layer: None
        with torch.device("meta"):
            return Transformer(config)
    finally:
        for kind, reset in zip(kinds, before, strict=True):
            kind.reset_parameters = reset


def save_model(model: Transformer, directory: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each whole or not at all.

    The weights keep the module's dtype. Tied heads are stored once, as transformers does; a Foreign is saved by
    transformers. UserError: a full disk, a folder that may not be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, directory) from error
    if isinstance(model, Foreign):
        save_stock(model.inner, directory)
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = model.config.to_hf_dict(dtype=str(model.head_weight.dtype).removeprefix("torch."))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    replace_weights(directory / WEIGHTS, state)
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"_from_model_config": True, **ends})


def replace_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write beside `path`, flush to disk, rename: a reader, or a run killed at any instant, finds old or new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _explained(path):
            save_file(state, temporary, metadata={"format": "pt"})
            _put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_stock(inner: Any, directory: Path) -> None:
    """The files of a model of transformers', the weights in one of them, each put in its place whole."""
    temporary = directory / f".model.{os.getpid()}.tmp"
    try:
        with _explained(directory / WEIGHTS), quiet():
            inner.save_pretrained(temporary, max_shard_size=10**18)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name != WEIGHTS):
                _put(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(file: Path, path: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    file.replace(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A full disk or a forbidden folder, met by whatever writes `path`, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # how safetensors passes on an OSError
        cause = error if isinstance(error, OSError) else OSError(int(code[1]) if code else 0, str(error))
        raise explain(cause, path) from error


def _refuse_pickles(directory: Path) -> None:
    """A pickle runs whatever code stands in it: none is loaded; convert.py makes safetensors of it, running none."""
    if directory.suffix in PICKLES and directory.is_file():
        found, source = [directory.name], directory
    else:
        found, source = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLES), directory
    whole = directory.is_dir() and any((directory / name).is_file() for name in (WEIGHTS, INDEX))
    weights = [name for name in found if not name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    if weights and not whole:
        why = f"holds pickled weights ({weights[0]}), which can run code when they are loaded"
        raise UserError(source, why, f"make safetensors of them: groundup convert {source} --output NEW")


def weight_files(directory: Path) -> list[Path]:
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


def read_tensors(
    path: Path, wanted: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype | None
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
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # a buffer of old checkpoints
                    found[name] = _tensor(file, path, name, wanted, device, dtype)
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"damaged or not safetensors ({error})", "fetch or save the model again") from None
    return found


def _tensor(
    file: Any,
    path: Path,
    name: str,
    wanted: dict[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    expected = wanted.get(EMBEDDING if name == HEAD else name)  # a head of the embedding's shape may always be there
    if expected is None:
        raise UserError(path, f"holds {name}, which this architecture has not", "check its config.json")
    shape = tuple(file.get_slice(name).get_shape())
    if shape != expected:
        raise UserError(path, f"{name} is {shape}, config.json says {expected}", "fetch the model again")
    tensor = file.get_tensor(name)
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        why = f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}: the weights are quantised"
        raise UserError(path, why, "use the unquantised model")
    narrow = device.type != "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
    target = dtype or (tensor.dtype if narrow else torch.float32)
    # clone: a tensor that still lives in the mapped file would change when the file does
    return tensor.to(device, target) if target != tensor.dtype else tensor.clone().to(device)
