"""How do pickled weights become a folder that may be loaded? Through torch's restricted unpickler, once.

A pickle is a program. The restricted unpickler (`torch.load(weights_only=True)`) knows how to make tensors and
containers and refuses everything else, so nothing of the file is run. Out comes a stock folder: safetensors,
config.json, and whatever of tokenizer and template was beside the weights.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from groundup.errors import UserError
from groundup.files import explain, write_json
from groundup.model.config import ModelConfig, read_json
from groundup.model.io import EMBEDDING, HEAD, INDEX, PICKLES, WEIGHTS, describe, load_model, read_config
from groundup.model.minimind import is_minimind, stock_config

PICKLE_INDEX = "pytorch_model.bin.index.json"
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")  # pickles that trainers leave
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# Where trainers keep a state dict beside other things, and what wrappers put before every name.
INSIDE = ("model", "state_dict", "model_state_dict", "module", "weights")
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
# Tables that architectures compute for themselves, and once saved.
TABLES = re.compile(r"rotary_emb\.inv_freq$|freqs_(cos|sin)$|pos_cis$|\.masked_bias$")
State = dict[str, torch.Tensor]


def convert(source: str | Path, output: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """Make a stock model folder of pickled weights, and report.

    source: a .bin, .pth or .pt file, or a folder with one or several (and an index). config: the folder that holds its
    config.json and tokenizer, or a config.json; default: beside the weights. MiniMind's weights need none. Memory: one
    file of the source; then the model, to see that it loads and computes.
    Raises UserError: no weights, a pickle that is more than weights (nothing of it is run), damaged ones, no config, an
    architecture without a stock twin, an output that exists; nothing is left behind then.
    """
    source, output = Path(source), Path(output)
    if output.exists() or output.is_symlink():
        raise UserError(output, "exists already", "choose another --output, or remove it first")
    files, home = _weight_files(source), _home(source, config)
    shapes = _shapes(files)
    found, notes = _config(home, shapes, source)
    with _staged(output) as folder:
        write_json(folder / "config.json", found)
        dropped = _write(folder, files, _ties(folder))
        for name in BESIDE if home is not None and home.is_dir() else ():
            if home is not None and (home / name).is_file():
                shutil.copyfile(home / name, folder / name)
        told = _try_out(folder, source)
        if not (folder / "tokenizer.json").is_file():
            notes.append("no tokenizer.json was there: copy the model's own into the folder")
    return {
        "output": str(output),
        "architecture": found["model_type"],
        "computed_by": told,
        "parameters": sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in dropped),
        "files": sorted(path.name for path in output.iterdir()),
        "dropped": dropped,
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "notes": notes,
    }


def _weight_files(source: Path) -> list[Path]:
    """The files that hold the weights: the one named, or those of an index, or all there are."""
    if source.is_file():
        if source.suffix not in (*PICKLES, ".safetensors"):
            raise UserError(source, "is no file of weights", f"give one of {', '.join(PICKLES)}, or a folder of them")
        return [source]
    if not source.is_dir():
        raise UserError(source, "no such file or folder", "give pickled weights, or a folder of them")
    for index in (source / PICKLE_INDEX, source / INDEX):
        if index.is_file():
            return _indexed(index)
    pickles = [p for p in source.iterdir() if p.suffix in PICKLES and not p.name.startswith(NO_WEIGHTS)]
    found = sorted(pickles or source.glob("*.safetensors"))
    if not found:
        raise UserError(source, "holds no weights", f"give a folder with {', '.join(PICKLES)}")
    return found


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(index, "not an index of weights", "fetch the model again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(index, f"names {name}, which is not in the folder", "fetch the model again")
    return [index.parent / name for name in names]


def _home(source: Path, config: str | Path | None) -> Path | None:
    """Where config.json and tokenizer are: a folder, or that config.json alone; None: nowhere."""
    if config is not None:
        home = Path(config)
        if (
            home.name != "config.json"
            and not (home / "config.json").is_file()
            and not (home / "tokenizer.json").is_file()
        ):
            raise UserError(home, "holds no config.json", "give the folder of the model's config.json and tokenizer")
        return home
    beside = source if source.is_dir() else source.parent
    return beside if (beside / "config.json").is_file() else None


def _config(home: Path | None, shapes: Mapping[str, tuple[int, ...]], source: Path) -> tuple[dict[str, Any], list[str]]:
    """The stock config.json of these weights, and what was assumed."""
    told: dict[str, Any] | None = None
    if home is not None and (home.is_file() or (home / "config.json").is_file()):
        told = read_json(home.parent if home.is_file() else home)
    if told is not None and not str(told.get("model_type")).lower().startswith("minimind"):
        return told, []
    if told is None and not is_minimind(shapes):
        fix = "give --config DIR with the model's config.json (heads and RoPE's base cannot be read off weights)"
        raise UserError(source, "has no config.json beside it", fix)
    return stock_config(shapes, told or {}, source)


def _ties(folder: Path) -> dict[str, str]:
    """name -> the name of the tensor that it is the same as, in the architecture of a folder's config.json."""
    config = read_config(folder)
    if isinstance(config, ModelConfig):
        return {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    model: Any = config.build("meta")
    return dict(model.all_tied_weights_keys)


def _write(folder: Path, files: list[Path], ties: Mapping[str, str]) -> list[str]:
    """A safetensors of each file, and an index where there are several. Returns the names that were left out."""
    names = [WEIGHTS]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    weight_map: dict[str, str] = {}
    dropped, size = [], 0
    for file, name in zip(files, names, strict=True):
        state = read_state(file)
        kept: State = {}
        for key, tensor in state.items():
            tied = key in ties and _same(tensor, ties[key], state, files)
            if tied or TABLES.search(key) or (key.endswith(".attn.bias") and tensor.ndim == 4):
                dropped.append(key)
            else:
                kept[key] = tensor.clone(memory_format=torch.contiguous_format)
        save_file(kept, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, name)
        size += sum(t.numel() * t.element_size() for t in kept.values())
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return sorted(dropped)


def _same(tensor: torch.Tensor, name: str, state: State, files: list[Path]) -> bool:
    """Whether the tensor called `name`, in this file or another, is this one."""
    other = state.get(name)
    if other is None:
        other = next((found[name] for found in map(read_state, files) if name in found), None)
    return other is not None and torch.equal(other, tensor)


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Of all tensors. UserError: two files that say the same, which are two models, not the parts of one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        new = {name: tuple(tensor.shape) for name, tensor in read_state(file).items()}
        twice = next((name for name in new if name in shapes), None)
        if twice is not None:
            names = ", ".join(path.name for path in files)
            raise UserError(file.parent, f"{twice} is in several of {names}", "name the file that you mean")
        shapes |= new
    return shapes


def read_state(path: Path) -> State:
    """The tensors of a file by name, mapped from it where its format allows. UserError: damaged, or more than that."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(path, f"damaged or not safetensors ({error})", "fetch it again") from None
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # a format of old, which cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        told = re.search(r"(?:GLOBAL|Unsupported (?:global|class)\S*) `?([\w.]+)", str(error))
        what = f" ({told[1]})" if told else ""
        why = f"holds more than weights{what}: it would run code, so it is not read"
        raise UserError(path, why, "ask its authors for safetensors, or save its state dict alone") from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, IndexError) as error:
        detail = str(error).strip().partition("\n")[0][:200]
        raise UserError(path, f"damaged or not weights ({detail})", "fetch it again") from None
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> State:
    """The state dict, which may lie inside something else, under the model's own names."""
    for key in INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(path, f"holds a {type(content).__name__}, not a state dict", "save model.state_dict()")
    found = {WRAPPED.sub("", str(k)): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not found:
        keys = ", ".join(str(key) for key in list(content)[:5])
        raise UserError(path, f"holds no tensor by name (but {keys or 'nothing'})", "save model.state_dict()")
    return found


def _try_out(folder: Path, source: Path) -> str:
    """Load the new folder and run it. Whose model it is, as `describe` says."""
    model = load_model(folder)
    ids_1T = torch.arange(min(8, model.config.vocab_size))[None]
    with torch.no_grad():
        if not model(ids_1T).isfinite().all():
            raise UserError(source, "its weights compute no numbers", "fetch it again")
    return describe(model)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder that takes the name `output` when the block ends well; however else it ends, nothing is left of it."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        code = re.search(r"os error (\d+)", str(error))  # how safetensors passes on an OSError
        cause = error if isinstance(error, OSError) else OSError(int(code[1]) if code else 0, str(error))
        raise explain(cause, output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
