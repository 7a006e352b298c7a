"""What does a reward model say? Its score of the prompt with the answer as the assistant's turn."""

from __future__ import annotations

from typing import Any

from groundup.rewards.episode import as_message
from groundup.rewards.said import Prompts, Scores, said


class RewardModel:
    """path: the folder of a reward model. thoughts: it reads them, too. device: as train.device."""

    def __init__(self, path: str, *, thoughts: bool = True, device: str = "auto") -> None:
        from groundup.infer.scoring import Scorer

        self.thoughts = thoughts
        self.scorer = Scorer(path, device=device)

    def __call__(self, prompts: Prompts, completions: list[str], **columns: Any) -> Scores:
        texts = completions if self.thoughts else [said(text).strip() for text in completions]
        answers = [as_message(text, self.scorer.tokenizer) for text in texts]
        pairs = zip(prompts, answers, strict=True)
        return list(self.scorer.score([[*prompt, answer] for prompt, answer in pairs]))
