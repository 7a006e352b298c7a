"""What does a reward model say? Its score of the prompt with the answer as the assistant's turn."""

from __future__ import annotations

import logging
from typing import Any

from groundup.rewards.episode import as_message
from groundup.rewards.said import Prompts, Scores, said

log = logging.getLogger(__name__)


class RewardModel:
    """path: the folder of a reward model. thoughts: it reads them, too. device: as train.device.

    An answer that is with its prompt longer than the model's context is not judged.
    """

    def __init__(self, path: str, *, thoughts: bool = True, device: str = "auto") -> None:
        from groundup.infer.scoring import Scorer

        self.path, self.thoughts = path, thoughts
        self.scorer = Scorer(path, device=device)
        self.told = False

    def __call__(self, prompts: Prompts, completions: list[str], **columns: Any) -> Scores:
        texts = completions if self.thoughts else [said(text).strip() for text in completions]
        answers = [as_message(text, self.scorer.tokenizer) for text in texts]
        pairs = zip(prompts, answers, strict=True)
        scores = self.scorer.score_fitting([[*prompt, answer] for prompt, answer in pairs])
        self._tell(scores.count(None), len(scores))
        return scores

    def _tell(self, longer: int, count: int) -> None:
        """Once: rounds may hold such answers again and again."""
        if longer and not self.told:
            text = "reward model %s: %d of %d answers are with their prompts longer than its context of %d tokens"
            log.warning(f"{text}; such answers are not judged", self.path, longer, count, self.scorer.context)
            self.told = True
