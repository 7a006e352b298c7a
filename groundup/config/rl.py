"""What can I set of reinforcement learning?"""

from __future__ import annotations

from pydantic import Field

from groundup.config.sections import Section


class RLConfig(Section):
    """PPO and the GRPO family: what is sampled, what it is worth, how far the policy may go (train/onpolicy.py)."""

    prompts: int = Field(16, ge=1, description="prompts of one rollout, over all ranks")
    group_size: int = Field(8, ge=1, description="answers to each prompt")
    max_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    temperature: float = Field(1.0, gt=0)
