"""What can I set of reinforcement learning?"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from groundup.config.sections import Section, SourceConfig

# What a key that the recipe leaves out means at each stage that samples.
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 8, "epochs": 1, "minibatches": 1, "beta": 0.0, "kl_in": "loss"},
    "ppo": {"group_size": 1, "epochs": 4, "minibatches": 2, "beta": 0.05, "kl_in": "reward"},
    "preference": {"group_size": 2, "epochs": 1, "minibatches": 1, "beta": 0.0, "kl_in": "loss"},
    "distill": {"group_size": 1, "epochs": 1, "minibatches": 1, "beta": 0.0, "kl_in": "loss"},
}
CLIP_HIGH = {"dapo": 0.28}  # where the paper's own differs from clip_low


class RewardSpec(Section):
    """One reward: a given one's name (groundup/rewards/), or `FILE.py:function`; weight times it is added up."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the function")


class ToolSpec(Section):
    """One tool: a given one's name (groundup/rewards/tools.py), or `FILE.py:function`."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict, description="its settings, as path of a search")


class RLConfig(Section):
    """PPO and the GRPO family: what is sampled, what it is worth, how far the policy may go (train/onpolicy.py)."""

    # What is sampled.
    prompts: int = Field(16, ge=1, description="prompts of one rollout, over all ranks")
    group_size: int | None = Field(None, ge=1, description="answers to each prompt; default: grpo 8, ppo 1")
    max_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1: needs importance_cap, which accounts for the cut")
    top_k: int = Field(0, ge=0, description="0: off, as top_p")
    enable_thinking: bool | None = Field(None, description="start answers in (true) or behind (false) a thought")
    max_sequences: int = Field(128, ge=1, description="answers written at once")
    dynamic_sampling: int = Field(
        0, ge=0, description="times that prompts whose answers are all worth the same are replaced by others (DAPO)"
    )
    tools: list[ToolSpec] = Field(default_factory=list, description="what the policy can call between its turns")
    tool_seconds: float = Field(10.0, gt=0, description="that a call of a tool of your own may take")
    turns: int = Field(4, ge=1, description="times that the policy may speak, with tools")
    # What it is worth.
    rewards: list[RewardSpec] = Field(default_factory=list)
    reward_seconds: float = Field(60.0, gt=0, description="that a reward function may take over one rollout")
    overlong_buffer: int = Field(0, ge=0, description="the last tokens before max_tokens cost up to 1 (DAPO)")
    mask_truncated_completions: bool = Field(False, description="answers cut at max_tokens are not trained")
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken off the reward of an answer cut at max_tokens")
    reward_clip: float = Field(0.0, ge=0, description="rewards are held within plus and minus this; 0: off")
    reward_norm: bool = Field(False, description="rewards are divided by their standard deviation so far")
    # How much better than expected that is.
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"] = Field(
        "grpo", description="of stage grpo (train/grpo.py)"
    )
    scale_rewards: Literal["auto", "group", "batch", "none"] = Field(
        "auto", description="by which standard deviation advantages are divided; auto: none for dr_grpo, else group"
    )
    advantage_eps: float = Field(1e-4, ge=0, description="added to that standard deviation")
    gamma: float = Field(1.0, ge=0, le=1, description="ppo: discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="ppo: lambda of generalised advantage estimation")
    whiten_rewards: bool = Field(False, description="ppo: rewards of tokens to standard deviation 1")
    whiten_advantages: bool = Field(True, description="ppo, reinforce++: to mean 0 and standard deviation 1")
    # How far the policy may go.
    epochs: int | None = Field(None, ge=1, description="times that a rollout is gone through; default: grpo 1, ppo 4")
    minibatches: int | None = Field(None, ge=1, description="optimizer steps each time; default: grpo 1, ppo 2")
    clip_low: float = Field(0.2, ge=0, description="ratios count down to 1 minus this")
    clip_high: float | None = Field(None, ge=0, description="and up to 1 plus this; default: clip_low, dapo .28")
    delta: float | None = Field(None, gt=1, description="most that a ratio counts where the advantage is negative")
    importance_cap: float = Field(
        0.0, ge=0, description="weigh tokens by trainer's over engine's probability, at most this; 0: off"
    )
    importance_level: Literal["token", "sequence"] = Field("token", description="or those of whole answers")
    importance_over: Literal["truncate", "mask"] = Field(
        "truncate", description="weights above importance_cap become it, or 0: not trained"
    )
    entropy_coef: float = Field(0.0, ge=0, description="times the entropy, taken off the loss")
    beta: float | None = Field(None, ge=0, description="times the KL from the reference; default: grpo 0, ppo .05")
    kl_in: Literal["loss", "reward"] | None = Field(None, description="where it goes; default: grpo loss, ppo reward")
    kl_kind: Literal["k1", "k2", "k3"] | None = Field(
        None, description="its estimate; default: k3 in the loss, k1 in the reward"
    )
    kl_target: float | None = Field(None, gt=0, description="nats an answer that beta is steered to (adaptive KL)")
    kl_horizon: int = Field(10_000, ge=1, description="answers over which beta is steered")
    kl_stop: float | None = Field(
        None, gt=0, description="a rollout is left once the policy is this many nats a token from where it was sampled"
    )
    # PPO's value model, and what is mixed in.
    value_model: str = Field(
        "copy", description="copy: the policy's start with a head of its own; shared: a head on it; or a reward model"
    )
    value_coef: float = Field(0.1, ge=0, description="times the value's loss")
    value_clip: float | None = Field(0.2, gt=0, description="values count within this of the old ones; null: off")
    value_lr_ratio: float = Field(1.0, gt=0, description="rate of the value model over that of the policy")
    ptx_data: list[SourceConfig] = Field(default_factory=list, description="files mixed in against forgetting")
    ptx_kind: Literal["text", "chat"] = Field("chat", description="documents, or conversations")
    ptx_rows: int = Field(8, ge=1, description="rows of them in an optimizer step, over all ranks")
    ptx_weight: float = Field(0.0, ge=0, description="times their cross entropy, added")
    # Health: outside of these a run has collapsed and stops.
    entropy_bounds: tuple[float, float] = Field((0.0, 6.0), description="nats a token, mean of a rollout")
    length_bounds: tuple[float, float] = Field((1.0, 1e9), description="tokens an answer, mean of a rollout")
    samples: int = Field(2, ge=0, description="prompts of each rollout whose answers go to samples.jsonl")

    @field_validator("rewards", "tools", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return [{"name": i} if isinstance(i, str) else i for i in items] if isinstance(items, list) else items

    @field_validator("ptx_data", mode="before")
    @classmethod
    def _ptx(cls, value: Any) -> Any:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return [{"path": i} if isinstance(i, str) else i for i in items] if isinstance(items, list) else items

    def at(self, stage: str) -> RLConfig:
        """With nothing left open: what is not set is as it should be at this stage."""
        given = DEFAULTS[stage]
        values = {name: default for name, default in given.items() if getattr(self, name) is None}
        if self.clip_high is None:
            values["clip_high"] = CLIP_HIGH.get(self.loss, self.clip_low) if stage == "grpo" else self.clip_low
        if self.kl_kind is None:
            values["kl_kind"] = "k1" if values.get("kl_in", self.kl_in) == "reward" else "k3"
        return self.model_copy(update=values)
