"""What can I set of the road to a reasoning model? One YAML file for all its stages (groundup/pipeline/reason.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from groundup.config.recipe import Recipe, build_recipe, closest, known_keys, read_yaml, set_key, value_of
from groundup.config.rl import RewardSpec
from groundup.config.sections import Section, SourceConfig
from groundup.errors import UserError

STAGES = {"cold_start": "sft", "grpo": "grpo", "sft": "sft", "grpo_all": "grpo"}  # section: stage of training
DECIDED = ("stage", "model", "tokenizer", "data", "output", "seed", "cache")  # by the pipeline, not by a section


class SampleConfig(Section):
    """Rejection sampling: of many answers those are kept that are right and readable (groundup/pipeline/sample.py)."""

    n: int = Field(4, ge=1, description="answers to each prompt")
    keep: int = Field(1, ge=1, description="most answers kept of a prompt")
    limit: int | None = Field(None, ge=1, description="prompts that are asked; default: all")
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    enable_thinking: bool | None = Field(None, description="start answers in (true) or behind (false) a thought")
    rewards: list[RewardSpec] = Field(default_factory=list, description="default: by the format of the prompts")
    least: float = Field(1.0, description="sum of rewards from which an answer is right")
    thought: bool = Field(True, description="only answers with a finished thought, or steps before their answer")
    least_language: float = Field(
        0.9, ge=0, le=1, description="share of words in the language of the question; 0: any language"
    )
    judged: bool = Field(
        False, description="write all answers that ended, right and wrong, too: a verifier learns of them"
    )
    most_repeated: float = Field(0.3, ge=0, le=1, description="share of runs of 6 words that were said before")

    @field_validator("rewards", mode="before")
    @classmethod
    def _rewards(cls, value: Any) -> Any:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return [{"name": i} if isinstance(i, str) else i for i in items] if isinstance(items, list) else items


class HeldOutConfig(Section):
    """What is asked after every stage."""

    data: list[str] = Field(default_factory=list, description="rows with answers")
    world: bool = Field(False, description="the built-in world's held-out questions, too")
    world_seed: int = 0
    reward: str | None = Field(None, description="what grades the rows; default: by their format")
    limit: int = Field(200, ge=1, description="questions of each file")
    max_tokens: int = Field(256, ge=1)
    enable_thinking: bool | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value


class ReasonRecipe(Section):
    """Cold start, GRPO with rules, rejection sampling, SFT on what was kept and general data, GRPO on all prompts.

    The sections of the four trainings hold any keys of a recipe but model, data and output; `shared` those of all.
    """

    model: str = Field(description="the folder that the road begins at: a chat model")
    output: str = Field(min_length=1)
    seed: int = 0
    cache: str | None = Field(None, description="folder of tokenised shards; default: the user's cache folder")
    thoughts: list[SourceConfig] = Field(min_length=1, description="conversations that think first: the cold start")
    prompts: list[SourceConfig] = Field(min_length=1, description="questions with answers: GRPO, rejection sampling")
    general: list[SourceConfig] = Field(
        default_factory=list, description="conversations mixed with what rejection sampling kept"
    )
    general_prompts: list[SourceConfig] = Field(
        default_factory=list, description="further questions with answers for the last GRPO"
    )
    kept_weight: float = Field(1.0, gt=0, description="times that the kept answers appear in an epoch of sft")
    restart: bool = Field(
        True, description="sft begins at `model` again, as R1's did; false: at the policy that was sampled"
    )
    shared: dict[str, Any] = Field(default_factory=dict)
    cold_start: dict[str, Any] = Field(default_factory=dict)
    grpo: dict[str, Any] = Field(default_factory=dict)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    sft: dict[str, Any] = Field(default_factory=dict)
    grpo_all: dict[str, Any] = Field(default_factory=dict)
    heldout: HeldOutConfig = Field(default_factory=HeldOutConfig)

    @field_validator("thoughts", "prompts", "general", "general_prompts", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return [{"path": i} if isinstance(i, str) else i for i in items] if isinstance(items, list) else items

    def recipe(self, section: str, model: str, data: list[Any], where: str = "recipe") -> Recipe:
        """The recipe of one training; it can be run by `groundup train` as it stands in the training's folder."""
        own = getattr(self, section)
        for name, keys in ((section, own), ("shared", self.shared)):
            if wrong := next((key for key in DECIDED if key in keys), None):
                raise UserError(where, f"{name}.{wrong} is decided by the pipeline", f"leave {name}.{wrong} out")
        shared = {key: value for key, value in self.shared.items() if key != "rl" or STAGES[section] == "grpo"}
        values = {
            **_merged(shared, own), "stage": STAGES[section], "model": model, "data": data, "seed": self.seed,
            "output": str(Path(self.output) / section), "cache": self.cache,
        }  # fmt: skip
        return build_recipe(values, where=f"{where}: {section}")


def load_reason(path: str | Path, overrides: Sequence[str] = ()) -> ReasonRecipe:
    """Read the YAML file and apply `key=value` overrides; a fault in any section is found here."""
    return build_reason(read_yaml(Path(path)), overrides, str(path))


def build_reason(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> ReasonRecipe:
    """Validate a dict into a ReasonRecipe; every fault names its key."""
    values = json.loads(json.dumps(values))
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise UserError(item, "not a key=value pair", "write e.g. grpo.train.steps=50")
        texts = ("model", "output", "cache", "thoughts", "prompts", "general", "general_prompts", "heldout.data")
        set_key(values, key.strip(), text if key.strip() in texts else value_of(key.strip(), text))
    try:
        reason = ReasonRecipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None
    for section in STAGES:
        reason.recipe(section, reason.model, [{"path": "a"}], where)
    return reason


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(where, f"unknown key {key}", closest(key, known_keys(ReasonRecipe)))
    if first["type"] == "missing":
        return UserError(where, f"{key} is missing", f"add it, or give {key}=... on the command line")
    return UserError(where, f"{key}: {first['msg']}, got {first.get('input')!r}", f"mend {key}")


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """own over shared, section by section."""
    both = {k for k in shared if isinstance(shared[k], dict) and isinstance(own.get(k), dict)}
    return {**shared, **own, **{key: _merged(shared[key], own[key]) for key in both}}
