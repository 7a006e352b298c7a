"""What can I set? A recipe: one YAML file, validated, with unknown keys refused and the likely key named.

`load_recipe("recipes/sft.yaml", ["train.steps=200", "optim.lr=3e-4"])` reads the file, applies the overrides and
returns a `Recipe`. Keys are grouped as the file shows them; `Recipe.model_fields` is the whole list.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from groundup.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceConfig(_Section):
    """One file (or `FOLDER:NAME` of a dataset_info.json) and its share in the mixture."""

    path: str
    weight: float = Field(1.0, gt=0, description="times (fractions allowed) its documents appear in an epoch")
    split: str | None = Field(None, description='disjoint share, as in "2,4,4:0": the first of shares 2:4:4')


class TrainConfig(_Section):
    """Length, batch and precision of a run. One of steps and epochs decides the length; steps wins."""

    steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="rows in one forward pass on one rank")
    accumulate: int = Field(1, ge=1, description="forward passes in one optimizer step")
    seq_len: int = Field(512, ge=2, description="tokens in a packed row")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else fp32"
    )
    compile: Literal["auto", "off", "blocks"] = Field("auto", description="torch.compile of the repeated block")
    activation_checkpointing: bool = False
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights that are saved; 0 turns it off")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: physical cores")
    save_every: int | None = Field(None, ge=1, description="steps; default: a tenth of the run")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")
    eval_every: int | None = Field(None, ge=1, description="steps; default: a tenth of the run")
    eval_rows: int = Field(64, ge=1, description="validation rows read at each evaluation")
    early_stop: int = Field(0, ge=0, description="evaluations without improvement before stopping; 0 turns it off")

    @field_validator("compile", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads the bare word off as false


class OptimConfig(_Section):
    """How weights move. Muon takes the 2-D weights inside the blocks, AdamW all others."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon's matrices")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    paged: bool = Field(False, description="CUDA: AdamW's moments leave the GPU when it is full (bitsandbytes)")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = Field(0.02, ge=0, description="steps if 1 or more, else a share of the run")
    decay: float = Field(0.2, ge=0, le=1, description="wsd: share of the run that decays")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate over the peak")


class AdaptConfig(_Section):
    """What moves when not everything moves. Terms and defaults are PEFT's where it has them."""

    method: Literal[
        "full", "freeze", "lora", "ia3", "bottleneck", "prompt", "p_tuning", "prefix", "p_tuning_v2"
    ] = "full"  # fmt: skip
    target: list[str] = Field(
        default_factory=lambda: ["all"],
        description="names (q_proj) or patterns (layers.[01].*proj) of layers; all: as in the method's paper",
    )
    rank: int = Field(8, ge=1, description="lora: width of the thin matrices")
    alpha: float = Field(16.0, gt=0, description="lora: the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="lora, bottleneck")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = Field(False, description="a trained length for each row of the matrix (arXiv 2402.09353)")
    init: Literal["default", "pissa"] = Field("default", description="pissa: the principal part moves (2404.02948)")
    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: rate of B over that of A (arXiv 2402.12354)")
    tokens: int = Field(20, ge=1, description="prompt, p_tuning, prefix, p_tuning_v2: virtual tokens")
    text: str | None = Field(None, description="prompt: words whose embeddings it starts from")
    width: int | None = Field(None, ge=1, description="inner width of p_tuning, prefix and bottleneck")
    first: int = Field(0, ge=0, description="freeze: layers from the start that move")
    last: int = Field(0, ge=0, description="freeze: layers from the end that move")
    train: list[str] = Field(default_factory=list, description="freeze: patterns of further parameters that move")
    save: list[str] = Field(
        default_factory=list, description="modules trained and saved whole beside the adapter: embed_tokens, lm_head"
    )
    base: Literal["full", "int8", "nf4"] = Field("full", description="how the frozen matrices are kept; nf4: QLoRA")
    double_quant: bool = Field(True, description="nf4: the blocks' scales in 8 bits, too")

    @field_validator("target", "train", "save", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value


class EvalConfig(_Section):
    """What is held out."""

    fraction: float = Field(0.01, ge=0, lt=1, description="share of documents held out for validation")
    data: list[str] = Field(default_factory=list, description="files of their own instead of a share")


class LogConfig(_Section):
    """Where figures go. metrics.jsonl is always written."""

    every: int = Field(10, ge=1, description="steps between two lines")
    to: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(default_factory=list)
    project: str = "groundup"
    online: bool = Field(False, description="let wandb and swanlab use the network")
    plots: bool = True


class Recipe(_Section):
    """A whole run. The resolved recipe is saved beside the weights as recipe.yaml."""

    stage: Literal["pretrain", "sft"]
    model: str = Field(description="a preset's name, or a model folder")
    tokenizer: str | None = Field(None, description="a tokenizer folder; default: the model folder's own")
    data: list[SourceConfig] = Field(min_length=1)
    fill: dict[str, str] = Field(default_factory=dict, description="name: words that stand for {{name}} in the rows")
    output: str = Field(min_length=1)
    seed: int = 0
    cache: str | None = Field(None, description="folder of tokenised shards; default: the user's cache folder")
    train: TrainConfig = Field(default_factory=TrainConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    adapt: AdaptConfig = Field(default_factory=AdaptConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return [{"path": i} if isinstance(i, str) else i for i in items] if isinstance(items, list) else items

    @field_validator("model", "tokenizer", "output", "cache", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, int, float)) else value

    def identity(self) -> dict[str, Any]:
        """The part that decides the weights: what must not change between a start and its resume."""
        kept = self.model_dump(mode="json", exclude={"output", "cache", "log"})
        for key in ("save_every", "keep_last", "threads", "device"):
            kept["train"].pop(key)
        return kept

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key that a recipe may hold, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def closest(word: str, choices: Sequence[str]) -> str:
    """`did you mean X?`, or the list of choices where nothing is near."""
    leaf = {c.rsplit(".", 1)[-1]: c for c in reversed(choices)}
    match = difflib.get_close_matches(word, choices, 1) or difflib.get_close_matches(
        word.rsplit(".", 1)[-1], list(leaf), 1
    )
    if match:
        return f"did you mean {leaf.get(match[0], match[0])}?"
    return "known: " + ", ".join(choices)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (values are YAML; `data=A,B` is a list of files)."""
    path = Path(path)
    return build_recipe(_read_yaml(path), overrides, where=str(path))


def build_recipe(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Validate a dict (plus overrides) into a Recipe; every fault names its key."""
    values = json.loads(json.dumps(values))  # a deep copy of plain data: the caller's dict stays as it is
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise UserError(item, "not a key=value pair", "write e.g. train.steps=200")
        _set(values, key.strip(), _value(key.strip(), text))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(path, "is a directory, not a recipe", "name a .yaml file")
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise UserError(path, "no such recipe", f"did you mean {path.parent / near[0]}?" if near else "see recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 text (byte {error.start})", "a recipe is a YAML file") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = path if line is None else f"{path}:{line + 1}"
        raise UserError(where, f"is not valid YAML ({getattr(error, 'problem', error)})", "mend that line") from None
    if not isinstance(values, dict):
        raise UserError(path, "holds no keys", "a recipe is a YAML mapping; see recipes/")
    return values


def _value(key: str, text: str) -> Any:
    """A YAML scalar or list; paths and names stay text, and 3e-4 (text in YAML 1.1) is left to pydantic."""
    if key in ("data", "model", "tokenizer", "output", "cache"):
        return text
    if key == "eval.data" and not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = values
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(dotted, f"{name} is not a section", closest(dotted, known_keys()))
    node[leaf] = value


def _explain(error: ValidationError, where: str) -> UserError:
    """The first fault of a pydantic error as one line; the rest are counted."""
    faults = error.errors()
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        return UserError(where, f"unknown key {key}{more}", closest(key, known_keys()))
    if first["type"] == "missing":
        return UserError(
            where, f"{key} is missing{more}", f"add it to the recipe, or give {key}=... on the command line"
        )
    got = first.get("input")
    return UserError(where, f"{key}: {first['msg']}, got {got!r}{more}", f"mend {key}")
