"""Prompts in, answers out: the engine for those who have all their prompts at hand, or one to watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import Completion, SamplingParams

if TYPE_CHECKING:
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    settings: EngineSettings | None = None,
) -> list[Completion]:
    """Answer all prompts, in their order; n answers of one stand one after another.

    prompts: token ids, or text that starts a document ([bos] + encode(text)). params: for all, or one for each.
    Raises UserError on an empty prompt, or one that leaves no room in the model's context.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    engine = Engine(model, tokenizer, settings)
    requests = [engine.add(p, s, where=f"prompt {i}") for i, (p, s) in enumerate(zip(prompts, each, strict=True), 1)]
    while engine.has_work:
        engine.step()
    return [completion for request in requests for completion in request.completions()]


class Stream(Iterator[str]):
    """Pieces of one answer as they become final; afterwards `completion` is set."""

    def __init__(self, engine: Engine, prompt: str | Sequence[int], params: SamplingParams) -> None:
        self.completion: Completion | None = None
        self._engine, self._request = engine, engine.add(prompt, params)

    def __next__(self) -> str:
        while self._engine.has_work:
            text = "".join(delta.text for delta in self._engine.step())
            if text:
                return text
        self.completion = self._request.completions()[0]
        raise StopIteration

    def close(self) -> None:
        """Ask for nothing more."""
        self._engine.abort(self._request)


def stream(engine: Engine, prompt: str | Sequence[int], params: SamplingParams) -> Stream:
    """Answer one prompt piece by piece; the pieces join to the text that `generate` gives. Errors as there.

    The engine remembers: a chat that goes on computes what is new only.
    """
    return Stream(engine, prompt, params)
