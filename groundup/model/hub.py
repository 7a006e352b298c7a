"""What does a model's name mean? A folder here, else a name on a hub: `Qwen/Qwen3-0.6B`, `modelscope:Qwen/Qwen3-0.6B`.

A folder always wins, and nothing that could be a misspelt path is looked for anywhere else; `hf:Qwen/Qwen3-0.6B` is
none, though a folder Qwen be there. What was fetched before is
found without a network. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE mean what they mean to
huggingface_hub, which does the fetching; MODELSCOPE_CACHE and MODELSCOPE_DOMAIN what they mean to modelscope.
"""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Any

from groundup.errors import UserError

HUGGING_FACE, MODELSCOPE = "hf:", "modelscope:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Weights as safetensors alone: no pickle is fetched, nor a line of code.
WANTED = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt",
]  # fmt: skip
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same model, in folders and beside it
BRING = "config.json, model*.safetensors (with their index), tokenizer.json, tokenizer_config.json, chat_template.jinja"


def is_hub_name(name: str) -> bool:
    """Whether a name could only mean a hub's: `owner/name` where no such folder is, or with the hub before it."""
    bare = name.removeprefix(MODELSCOPE).removeprefix(HUGGING_FACE)
    if name == bare and (Path(name).exists() or Path(name).parent.is_dir()):
        return False  # a folder, or a misspelt one beside others
    return HUB_NAME.fullmatch(bare) is not None


def resolve(name: str | Path) -> Path:
    """The folder of a model: the one that stands there, or the hub's, fetched or found where it was fetched to.

    Raises UserError: no such folder and no name of a hub; a hub's name without a network, which says what to bring.
    """
    path = Path(name)
    if str(name) and path.exists():
        return path
    if not is_hub_name(str(name)):
        raise UserError(name, "no such folder", _near(path))
    bare = str(name).removeprefix(MODELSCOPE).removeprefix(HUGGING_FACE)
    found = _modelscope(bare) if str(name).startswith(MODELSCOPE) else _hugging_face(bare)
    for kind, there in (("config.json", ["config.json"]), ("weights in safetensors", ["*.safetensors"])):
        if not any(any(found.glob(pattern)) for pattern in there):
            raise UserError(name, f"has no {kind} ({found})", "use a model that has; GGUF files: groundup import")
    return found


def _hugging_face(name: str) -> Path:
    hub: Any = importlib.import_module("huggingface_hub")
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError:
        fix = "accept its terms on its page and log in: hf auth login"
        raise UserError(name, "its owners want you to accept their terms first", fix) from None
    except errors.RepositoryNotFoundError:
        fix = f"check the spelling (a private one needs: hf auth login), or {_bring(name)}"
        raise UserError(name, "is neither a folder here nor on the hub", fix) from None
    except OSError as error:  # no network, or told not to use it; a disk that is full
        raise _unreachable(name, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "huggingface_hub", "requests"):
            raise
        raise _unreachable(name, error) from error


def _modelscope(name: str) -> Path:
    try:
        hub: Any = importlib.import_module("modelscope")
    except ImportError:
        fix = f"pip install modelscope, or {_bring(name)}"
        raise UserError(MODELSCOPE + name, "needs the package modelscope", fix) from None
    files = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        return Path(hub.snapshot_download(name, **files))
    except Exception as error:  # of many kinds, some of them plain ValueErrors
        try:
            return Path(hub.snapshot_download(name, local_files_only=True, **files))  # fetched before
        except Exception:
            raise _unreachable(MODELSCOPE + name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    detail = str(error).strip().partition("\n")[0][:200]
    why = f"is no folder here, was not fetched before, and the hub cannot be reached ({detail})"
    return UserError(name, why, _bring(name.removeprefix(MODELSCOPE)))


def _bring(name: str) -> str:
    return f"put its files ({BRING}) into the folder {name}, or name another folder that holds them"


def _near(path: Path) -> str:
    """What may have been meant."""
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, 1)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return "name a model folder, or a hub's model as owner/name"
