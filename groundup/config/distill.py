"""What can I set of learning from another model?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groundup.config.sections import Section


class DistillConfig(Section):
    """A student and its teacher (objectives/distill.py)."""

    teacher: str | None = Field(None, description="the teacher's folder")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
