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
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from groundup.config.distill import DistillConfig
from groundup.config.preference import PreferenceConfig
from groundup.config.reward import RewardConfig
from groundup.config.rl import RLConfig
from groundup.config.sections import (
    AdaptConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    Section,
    SourceConfig,
    TrainConfig,
)
from groundup.errors import UserError

# The sections that only some stages read. preference and distill sample from the policy when they are on-policy.
USED: dict[str, set[str]] = {
    "reward": {"reward"}, "preference": {"preference", "rl"}, "ppo": {"rl"}, "grpo": {"rl"},
    "distill": {"distill", "rl"},
}  # fmt: skip
OWN = ("reward", "preference", "rl", "distill")


class Recipe(Section):
    """A whole run. The resolved recipe is saved beside the weights as recipe.yaml."""

    stage: Literal["pretrain", "sft", "reward", "preference", "ppo", "grpo", "distill"]
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
    reward: RewardConfig = Field(default_factory=RewardConfig)
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
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

    @model_validator(mode="after")
    def _sections(self) -> Recipe:
        for name in self._unused():
            if getattr(self, name) != type(getattr(self, name))():
                raise ValueError(f"stage {self.stage} does not read the section {name}")
        return self

    def _unused(self) -> set[str]:
        return set(OWN) - USED.get(self.stage, set())

    def identity(self) -> dict[str, Any]:
        """The part that decides the weights: what must not change between a start and its resume."""
        kept = self.model_dump(mode="json", exclude={"output", "cache", "log", *self._unused()})
        for key in ("save_every", "keep_last", "threads", "device"):
            kept["train"].pop(key)
        return kept

    def to_yaml(self) -> str:
        kept = self.model_dump(mode="json", exclude=self._unused())
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


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
    return build_recipe(read_yaml(path), overrides, where=str(path))


def build_recipe(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Validate a dict (plus overrides) into a Recipe; every fault names its key."""
    values = json.loads(json.dumps(values))  # a deep copy of plain data: the caller's dict stays as it is
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise UserError(item, "not a key=value pair", "write e.g. train.steps=200")
        set_key(values, key.strip(), value_of(key.strip(), text))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def read_yaml(path: Path) -> dict[str, Any]:
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


def value_of(key: str, text: str) -> Any:
    """A YAML scalar or list; paths and names stay text, and 3e-4 (text in YAML 1.1) is left to pydantic."""
    if key in ("data", "model", "tokenizer", "output", "cache"):
        return text
    if key == "eval.data" and not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
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
