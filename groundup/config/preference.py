"""What can I set of learning from preferences without reinforcement?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groundup.config.sections import Section


class PreferenceConfig(Section):
    """DPO and its relatives (objectives/preference.py)."""

    loss: Literal[
        "dpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "apo_zero", "apo_down"
    ] = "dpo"  # fmt: skip
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference; orpo: lambda")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: conservative; robust: share of flipped pairs")
    margin: float = Field(0.5, ge=0, description="simpo: target margin gamma, as it is added (not gamma / beta)")
    sft_weight: float = Field(0.0, ge=0, description="times the chosen answers' cross entropy, added (RPO)")
    reference: Literal["auto", "copy", "adapter", "cached", "none"] = Field(
        "auto", description="frozen copy, the base below the adapter, or its logprobs computed once and kept on disk"
    )
