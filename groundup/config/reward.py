"""What can I set of a reward model?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groundup.config.sections import Section


class RewardConfig(Section):
    """Scores learnt from pairs, from judged steps, or from right and wrong answers (objectives/reward.py)."""

    loss: Literal["pair", "divergence", "process", "outcome"] = Field(
        "pair", description="divergence: DeepSpeed-Chat's, averaged from the first token in which the two differ"
    )
    margin: float = Field(0.0, ge=0, description="the better answer shall lead by so much")
    centring: float = Field(0.0, ge=0, description="times the squared sum of both scores, so that they stay around 0")
