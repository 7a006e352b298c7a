"""Is it good? Everything that `groundup eval` measures of a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.eval.world import Answerer
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer

ANSWER_TOKENS = 48  # answers of the built-in world take 6; this leaves room for a short thought


def evaluate(
    path: str | Path,
    data: Sequence[str | Path] = (),
    world: bool = False,
    seed: int = 0,
    device: str = "auto",
    quantize: str | None = None,
) -> dict[str, Any]:
    """{"model", "files": [...bits_per_byte...], "world_exact_zh", "world_exact_en", "kinds"}: what was asked for.

    data: text or chat files. world: exact match on the held-out questions of the built-in world of `seed`.
    quantize: a scheme of infer/linear.py: files say what it costs, the world is answered by the quantised model.
    Raises UserError when nothing was asked for, or the folder or a file cannot be read.
    """
    if not data and not world:
        raise UserError("groundup eval", "nothing to measure", "give --data FILES or --world")
    from groundup.adapt.open import open_model, open_tokenizer
    from groundup.device import pick_device, set_threads
    from groundup.eval.bpb import measure_files

    set_threads()
    tokenizer = open_tokenizer(path)
    model = open_model(path, device=pick_device(device))
    result: dict[str, Any] = {"model": str(path)}
    if data:
        result["files"] = measure_files(model, tokenizer, data, quantize=quantize)
    if world:
        from groundup.eval.world import evaluate_world
        from groundup.world import World

        built = World(seed)
        questions = [q for language in ("zh", "en") for q in built.questions("heldout", language)]
        result |= evaluate_world(questions, answerer(model, tokenizer, quantize=quantize))
    return result


def answerer(
    model: Transformer,
    tokenizer: Tokenizer,
    max_tokens: int = ANSWER_TOKENS,
    think: bool | None = None,
    quantize: str | None = None,
) -> Answerer:
    """The model as something that evaluate_world can ask: lists of messages in, greedy answers out."""
    from groundup.infer.engine import EngineSettings
    from groundup.infer.generate import generate
    from groundup.infer.params import SamplingParams

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str]:
        prompts = [
            tokenizer.render(messages, add_generation_prompt=True, enable_thinking=think).ids
            for messages in conversations
        ]
        params, settings = SamplingParams(max_tokens=max_tokens), EngineSettings(quantize=quantize)
        return [c.text for c in generate(model, tokenizer, prompts, params, settings)]

    return answer
