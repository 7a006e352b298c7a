"""What can I set of learning from preferences without reinforcement?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from groundup.config.sections import Section

UNPAIRED = ("kto", "apo_zero_unpaired")  # losses of single answers, each wanted or not
FREE = ("simpo", "orpo")  # losses without a reference
RATIOS = (
    "dpo",
    "robust",
    "ipo",
    "hinge",
)  # losses of one number: how much more likely than the reference, chosen - rejected
SMOOTHED = ("dpo", "robust", "simpo")


class PreferenceConfig(Section):
    """DPO and its relatives (objectives/preference.py)."""

    loss: Literal[
        "dpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "apo_zero", "apo_down", "apo_zero_unpaired"
    ] = "dpo"  # fmt: skip
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference; orpo: lambda")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken to be flipped; dpo: conservative, robust: unbiased; simpo"
    )
    margin: float = Field(0.5, ge=0, description="simpo: target margin gamma, as it is added (not gamma / beta)")
    average: bool | None = Field(
        None, description="log ratios per token, not summed; default: for ipo alone (as TRL; OpenRLHF sums there, too)"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="what holds the policy to the reference (arXiv 2309.16240); dpo, robust, ipo, hinge"
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha of alpha_divergence")
    sft_weight: float = Field(0.0, ge=0, description="times the chosen answers' cross entropy, added (RPO)")
    desirable_weight: float = Field(1.0, ge=0, description="kto: of wanted answers; see the warning of unbalanced data")
    undesirable_weight: float = Field(1.0, ge=0, description="kto: of unwanted answers")
    reference: Literal["auto", "copy", "adapter", "cached", "none"] = Field(
        "auto", description="frozen copy, the base below the adapter, or its logprobs computed once and kept on disk"
    )
    online: bool = Field(
        False, description="pairs are the policy's own best and worst answers to prompts, as rl.rewards judge them"
    )

    @model_validator(mode="after")
    def _fit(self) -> PreferenceConfig:
        default = type(self).model_construct()
        users = {"label_smoothing": SMOOTHED, "f_divergence_type": RATIOS, "average": RATIOS}
        users |= {"desirable_weight": UNPAIRED, "undesirable_weight": UNPAIRED}
        for key, losses in users.items():
            if self.loss not in losses and getattr(self, key) != getattr(default, key):
                raise ValueError(f"loss {self.loss} does not read {key} ({', '.join(losses)} do)")
        if self.loss == "orpo" and self.sft_weight:
            raise ValueError("loss orpo has the chosen answers' cross entropy already: leave sft_weight at 0")
        if self.loss in FREE and self.reference not in ("auto", "none"):
            raise ValueError(f"loss {self.loss} has no reference: leave `reference` out")
        if self.loss not in (*FREE, *RATIOS) and self.reference == "none":
            raise ValueError(f"loss {self.loss} compares with a reference: reference none is for {', '.join(RATIOS)}")
        if self.online and (not self.paired or self.reference == "cached"):
            what = f"loss {self.loss}" if not self.paired else "reference cached"
            raise ValueError(f"{what} is not for online: nothing is known of an answer before it was said")
        if self.loss == "kto" and self.reference == "cached":
            why = "kto asks the reference for answers to other questions, and for others at each step"
            raise ValueError(f"{why}: use reference copy or adapter, or loss apo_zero_unpaired")
        return self

    @property
    def paired(self) -> bool:
        return self.loss not in UNPAIRED

    def kept(self, method: str) -> Literal["copy", "adapter", "cached", "none"]:
        """How the reference is had where adapt.method is `method`: what "auto" stands for."""
        if self.reference != "auto":
            return self.reference
        if self.loss in FREE:
            return "none"
        return "copy" if method in ("full", "freeze") else "adapter"
