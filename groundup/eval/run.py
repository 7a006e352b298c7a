"""Is it good? Everything that `groundup eval` measures of a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.eval.budget import Asking
    from groundup.eval.questions import QuestionSet
    from groundup.eval.world import Answerer
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer

ANSWER_TOKENS = 48  # answers of the built-in world take 6; this leaves room for a short thought
PROMPTS = 200  # of the endless prompts to think first


def evaluate(
    path: str | Path,
    data: Sequence[str | Path] = (),
    world: bool = False,
    seed: int = 0,
    device: str = "auto",
    quantize: str | None = None,
    reasoning: bool = False,
    asking: Asking | None = None,
    verifier: str | Path | None = None,
    reward: str | None = None,
    limit: int | None = None,
    kinds: Sequence[str] = (),
    output: str | Path | None = None,
) -> dict[str, Any]:
    """{"model", "files": [...bits_per_byte...], "world_exact_zh", "world_exact_en", "kinds"}: what was asked for.

    data: text or chat files, and rows with answers, which are asked. world: exact match on the held-out questions of
    the built-in world of `seed`; reasoning: its held-out prompts to think first. asking: how questions are put and
    answered (eval/budget.py); the figures are then under "asked", by the set's name. reward: grades rows with answers.
    limit: at most so many of them, and of the prompts to think. kinds: of the world's questions that are asked.
    output: folder for curves. verifier: judges samples.
    quantize: a scheme of infer/linear.py: files say what it costs, questions are answered by the quantised model.
    Raises UserError when nothing was asked for, or the folder or a file cannot be read.
    """
    if not data and not world and not reasoning:
        raise UserError("groundup eval", "nothing to measure", "give --data FILES, --world or --reasoning")
    if verifier and not (asking and asking.strategy):
        raise UserError("--verifier", "judges the samples of a strategy", "give --strategy best-of-n, or leave it out")
    from groundup.adapt.open import open_model, open_tokenizer
    from groundup.device import pick_device, set_threads
    from groundup.eval.bpb import measure_files
    from groundup.eval.budget import Asking
    from groundup.eval.questions import file_questions, world_questions, world_reasoning
    from groundup.world import World

    set_threads()
    tokenizer = open_tokenizer(path)
    model = open_model(path, device=pick_device(device))
    result: dict[str, Any] = {"model": str(path)}
    asking = asking or (Asking() if kinds else None)
    graded = [file for file in data if _is_graded(file)]
    if texts := [file for file in data if file not in graded]:
        result["files"] = measure_files(model, tokenizer, texts, quantize=quantize)
    if graded or reasoning or (world and asking):
        sets = [world_questions(World(seed), asking.style, kinds)] if world and asking else []
        sets += [world_reasoning(World(seed), count=limit or PROMPTS)] if reasoning else []
        sets += [file_questions(file, reward, asking.style.shots if asking else 0, limit) for file in graded]
        result["asked"] = _ask(model, tokenizer, sets, asking, verifier, quantize, output)
    if world and not asking:
        from groundup.eval.world import evaluate_world

        if quantize and "asked" in result:  # whose engine has used the model up
            model = open_model(path, device=pick_device(device))
        built = World(seed)
        questions = [q for language in ("zh", "en") for q in built.questions("heldout", language)]
        result |= evaluate_world(questions, answerer(model, tokenizer, quantize=quantize))
    return result


def asking_of(shots: int, cot: bool, seed: int, **given: Any) -> Asking | None:
    """The settings of a command line; None where nothing was asked for but the defaults."""
    from groundup.eval.budget import Asking
    from groundup.eval.prompts import PromptStyle

    given = {name: value for name, value in given.items() if value is not None}
    if not (shots or cot or given.keys() - {"budget", "step"}):
        return None
    return Asking(PromptStyle(shots, cot, seed), seed=seed, **given)


def _is_graded(file: str | Path) -> bool:
    from groundup.data.read import Reader
    from groundup.data.rows import Prompt

    return isinstance(next(iter(Reader(file))), Prompt)


def _ask(
    model: Transformer,
    tokenizer: Tokenizer,
    sets: list[QuestionSet],
    asking: Asking | None,
    verifier: str | Path | None,
    quantize: str | None,
    output: str | Path | None,
) -> dict[str, Any]:
    """Every set's figures; where there is a curve, its picture and figures are files of `output`."""
    from groundup.eval.budget import Asking, draw_budget, measure
    from groundup.files import write_json
    from groundup.infer.engine import Engine, EngineSettings
    from groundup.infer.strategies import open_verifier

    asking = asking or Asking()
    score = open_verifier(verifier) if verifier else None
    engine = Engine(model, tokenizer, EngineSettings(quantize=quantize))
    found = {}
    for questions in sets:
        figures = found[questions.name] = measure(engine, questions, asking, score)
        if "curve" in figures and output is not None:
            plot = Path(output) / f"budget-{Path(questions.name).stem}.png"
            draw_budget(figures, f"{questions.name}: {figures['strategy']}", plot)
            figures["plot"] = str(plot)
            write_json(plot.with_suffix(".json"), figures)
    return found


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
