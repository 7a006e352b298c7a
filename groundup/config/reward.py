"""What can I set of a reward model?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from groundup.config.sections import Section

PAIRED = ("pair", "divergence")


class RewardConfig(Section):
    """Scores learnt from pairs, from judged steps, or from right and wrong answers (objectives/reward.py)."""

    loss: Literal["pair", "divergence", "process", "outcome"] = Field(
        "pair",
        description="pair: score of the last token; divergence: DeepSpeed-Chat's, averaged from the first token in "
        "which the two differ; process: steps, each right or wrong; outcome: whole answers, each right or wrong",
    )
    margin: float = Field(0.0, ge=0, description="pair, divergence: the better answer shall lead by so much")
    centring: float = Field(
        0.0, ge=0, description="pair, divergence: times the squared sum of both scores, so that they stay around 0"
    )

    @model_validator(mode="after")
    def _fit(self) -> RewardConfig:
        for key in ("margin", "centring"):
            if not self.paired and getattr(self, key):
                raise ValueError(f"loss {self.loss} does not read {key} ({', '.join(PAIRED)} do)")
        return self

    @property
    def paired(self) -> bool:
        """Whether it learns from pairs of answers, or else from judgements of single ones."""
        return self.loss in PAIRED

    @property
    def label(self) -> str:
        """What a score means, as the model's config.json says it."""
        return {"process": "step_right", "outcome": "right"}.get(self.loss, "reward")
