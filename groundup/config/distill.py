"""What can I set of learning from another model?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from groundup.config.sections import Section


class DistillConfig(Section):
    """A student and its teacher (objectives/distill.py).

    The loss of a token is alpha * CE + (1 - alpha) * divergence, and what hidden_weight and attention_weight add.
    """

    teacher: str | None = Field(None, description="the teacher's folder, or a hub's name; it has the same tokenizer")
    data: Literal["chat", "text"] = Field("chat", description="conversations (answers are trained), or documents")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="KL(teacher || student), KL(student || teacher), both times temperature^2; jsd: as GKD, without it",
    )
    beta: float = Field(0.5, ge=0, le=1, description="jsd: the teacher's share of the mixture; 0, 1: the two KLs")
    temperature: float = Field(1.0, gt=0, description="of both distributions in the divergence")
    alpha: float = Field(0.5, ge=0, le=1, description="share of the data's own cross entropy in the loss")
    lmbda: float = Field(
        0.0, ge=0, le=1, description="GKD: share of steps on the student's own answers (the section rl samples them)"
    )
    top_k: int = Field(
        0, ge=0, description="keep the teacher's k likeliest tokens on disk, once, instead of running it beside"
    )
    hidden_weight: float = Field(0.0, ge=0, description="times the distance of hidden states, layer by layer")
    attention_weight: float = Field(0.0, ge=0, description="times the divergence of attention, layer by layer")
    layers: list[int] = Field(
        default_factory=list, description="the student's layers that are matched (0 first, -1 last); default: all"
    )

    @model_validator(mode="after")
    def _together(self) -> DistillConfig:
        if self.top_k and (self.lmbda or self.hidden_weight or self.attention_weight):
            raise ValueError("top_k keeps no teacher at hand, which lmbda, hidden_weight and attention_weight need")
        if self.lmbda and self.data == "text":
            raise ValueError("lmbda answers prompts, and data=text holds none")
        return self

    @property
    def weight(self) -> float:
        """Of the divergence: what alpha leaves, times temperature^2 where the divergence is a plain KL."""
        return (1 - self.alpha) * (1.0 if self.divergence == "jsd" else self.temperature**2)

    @property
    def mixture(self) -> float:
        """beta, of any divergence."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.divergence]

    @property
    def inside(self) -> bool:
        """Whether layers are compared, too."""
        return bool(self.hidden_weight or self.attention_weight)
