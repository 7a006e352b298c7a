"""Would a person want to read this? What makes an answer fit to be learned from, besides being right."""

from __future__ import annotations

from groundup.config.reason import SampleConfig
from groundup.infer.answers import final_answer
from groundup.infer.thinking import split_thinking
from groundup.rewards.language import language
from groundup.rewards.repetition import repetition

RUN = 6  # words that are a quotation when they come again


def fault(question: str, reply: str, config: SampleConfig) -> str | None:
    """Why the reply is not fit to be learned from: "no thought", "language", "repetition"; None where it is.

    question: the words that were asked last. reply: with its thoughts as the template writes them.
    """
    thought, said = split_thinking(reply)
    if config.thought and not _worked(thought, said):
        return "no thought"
    asked = [[{"role": "user", "content": question}]]
    share = language(asked, [reply])[0]  # None: the question is in no language that can be told
    if share is not None and share < config.least_language:
        return "language"
    again = repetition([], [reply], n=RUN)[0]
    if again is not None and -again > config.most_repeated:
        return "repetition"
    return None


def _worked(thought: str, said: str) -> bool:
    """A thought that has ended before an answer, or, of models that think aloud, more lines than the answer's."""
    answer = final_answer(said)
    return bool(answer and (thought.strip() or len(said.strip()) > 2 * len(answer) + len("The answer is .")))
