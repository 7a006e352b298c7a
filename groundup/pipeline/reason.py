"""How does a chat model learn to think? The stages of DeepSeek-R1 (arXiv 2501.12948, section 2.3), from one YAML file.

    cold start      SFT on conversations that think first: the format, and words to think in
    grpo            GRPO with rules on questions with answers: which thoughts lead to right answers
    sample          rejection sampling: many answers of that policy, of which the right and readable ones are kept
    sft             SFT on what was kept, mixed with general conversations, begun at the first model again
    grpo_all        GRPO once more, on all prompts

Each is a folder of its own and can be resumed; reason.json says what is done: the same command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.config.reason import ReasonRecipe, load_reason
from groundup.data.read import Reader
from groundup.data.rows import Chat, Prompt
from groundup.device import describe, pick_device, set_threads
from groundup.dist.mesh import rank_and_size
from groundup.errors import UserError
from groundup.pipeline.sample import sample_rows
from groundup.quickstart.run import Journal, say
from groundup.train.folder import first_difference
from groundup.train.run import train

if TYPE_CHECKING:
    from groundup.infer.engine import Engine

SHOWN = 6  # questions of the report's samples


def reason(recipe: ReasonRecipe | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run all stages and return what report.json holds. The same recipe and output goes on where it was.

    UserError: whatever is wrong with the recipe or its files, before the first stage begins where it can be known.
    """
    asked = recipe if isinstance(recipe, ReasonRecipe) else load_reason(recipe, overrides)
    if rank_and_size()[1] > 1:
        fix = "start it without torchrun; its stages stand in their folders as recipes for groundup train"
        raise UserError("groundup pipeline", "is one process", fix)
    _check_files(asked)
    settings = asked.model_dump(mode="json", exclude={"output", "cache"})
    steps = Journal(Path(asked.output), {"recipe": settings}, file="reason.json", differs=_differs)
    set_threads()
    return _run(steps, asked)


def _differs(output: Path, before: Any, now: Any) -> UserError:
    key, was, wanted = first_difference(before["recipe"], now["recipe"]) or ("recipe", before, now)
    return UserError(output, f"was started with {key}={was}, not {wanted}", "give the same, or choose another output")


def _check_files(asked: ReasonRecipe) -> None:
    """Every file holds the rows that its stage needs, by its first one."""
    chats = [source.path for source in (*asked.thoughts, *asked.general)]
    prompts = [source.path for source in (*asked.prompts, *asked.general_prompts)] + asked.heldout.data
    for paths, kind, what in ((chats, Chat, "conversations"), (prompts, Prompt, "questions with answers")):
        for path in paths:
            row = next(iter(Reader(path)))
            if not isinstance(row, kind):
                raise UserError(path, f"holds {type(row).__name__} rows where {what} are needed", "see docs/formats.md")


def _run(steps: Journal, asked: ReasonRecipe) -> dict[str, Any]:
    """All stages in order; what the journal has is not done again."""
    from groundup.eval.report import write_report

    output = steps.output
    machine = steps.step("look at the machine", describe)
    rows = [{"name": "start", "metrics": steps.step("evaluate start", partial(_evaluate, asked, asked.model))}]

    def trained(section: str, model: str, data: list[dict[str, Any]]) -> str:
        recipe = asked.recipe(section, model, data)
        say(f"{section.replace('_', ' ')}: {recipe.stage} of {model}")
        result = train(recipe)
        folder = _plain(recipe.model, result["output"])
        held = steps.step(f"evaluate {section}", partial(_evaluate, asked, folder))
        figures = {key: result[key] for key in ("seconds", "tokens", "steps", "parameters")}
        rows.append({"name": section.replace("_", " "), **figures, "metrics": {**result["metrics"], **held}})
        return folder

    thoughts, prompts, general, others = (
        [source.model_dump(mode="json") for source in sources]
        for sources in (asked.thoughts, asked.prompts, asked.general, asked.general_prompts)
    )
    policy = trained("grpo", trained("cold_start", asked.model, thoughts), prompts)
    say(f"sample: {asked.sample.n} answers of {policy} to each prompt")
    found = sample_rows(policy, asked.prompts, output / "sample" / "kept.jsonl", asked.sample, asked.seed, say=say)
    rows.append(_sampled(found))
    kept = {"path": found["output"], "weight": asked.kept_weight}
    model = trained("sft", asked.model if asked.restart else policy, [kept, *general])
    model = trained("grpo_all", model, [*prompts, *others])
    trainings = ("cold_start", "grpo", "sft", "grpo_all")
    return write_report(
        output,
        {
            "title": "groundup pipeline reason",
            "machine": machine,
            "stages": rows,
            "samples": steps.step("sample answers", partial(_samples, asked, model)),
            "curves": {name: output / name / "metrics.jsonl" for name in trainings},
            "next_commands": [f"groundup chat {model}", *_next(asked, model)],
        },
    )


def _plain(base: str, folder: str) -> str:
    """The folder that the next stage begins at: an adapter is merged into its base first."""
    from groundup.adapt.folder import is_adapter

    if not is_adapter(Path(folder)):
        return folder
    from groundup.adapt.merge import merge

    target = Path(folder) / "merged"
    if not target.exists():  # it is written beside its place, and renamed when it is whole
        say(f"merge {folder}")
        merge(base, [(folder, 1.0)], target)
    return str(target)


def _sampled(found: dict[str, Any]) -> dict[str, Any]:
    """Rejection sampling as a row of the report."""
    metrics = {"samples_right": found["right"], "rows_kept": found["kept"], "rejected": found["rejected"]}
    return {"name": "sample", "seconds": found["seconds"], "tokens": found["tokens"], "metrics": metrics}


def _engine(model: str) -> Engine:
    from groundup.adapt.open import open_model, open_tokenizer
    from groundup.infer.engine import Engine

    return Engine(open_model(model, device=pick_device()), open_tokenizer(model))


def _evaluate(asked: ReasonRecipe, model: str) -> dict[str, Any]:
    """Greedy answers to the held-out questions: how many are right, thought about, and how long they are."""
    from groundup.eval.budget import Asking, measure
    from groundup.eval.questions import file_questions

    held, metrics = asked.heldout, dict[str, Any]()
    engine = _engine(model)
    asking = Asking(think=held.enable_thinking, max_tokens=held.max_tokens)
    files = {}
    for path in held.data:
        files[path] = measure(engine, file_questions(path, held.reward, limit=held.limit), asking)
    total = sum(found["questions"] for found in files.values())
    for ours, theirs in (("answers_right", "accuracy"), ("thinks", "thinks"), ("answer_tokens", "tokens")):
        if total:
            metrics[ours] = sum(found[theirs] * found["questions"] for found in files.values()) / total
    if held.world:
        metrics |= _world(engine, held.world_seed)
    return metrics | {"files": files} if files else metrics


def _world(engine: Engine, seed: int) -> dict[str, Any]:
    """Exact match on the built-in world's held-out questions: what it knew before shall not be lost."""
    from groundup.eval.world import evaluate_world
    from groundup.infer.params import SamplingParams
    from groundup.infer.strategies import ask, sample
    from groundup.world import World

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str]:
        asked = [ask(engine.tokenizer, messages) for messages in conversations]
        return [samples[0].text for samples in sample(engine, asked, SamplingParams(max_tokens=128), 1)]

    world = World(seed)
    return evaluate_world([q for language in ("zh", "en") for q in world.questions("heldout", language)], answer)


def _samples(asked: ReasonRecipe, model: str) -> list[dict[str, Any]]:
    """Some held-out questions with the last model's answers, thoughts included."""
    from groundup.eval.questions import file_questions
    from groundup.infer.params import SamplingParams
    from groundup.infer.strategies import ask, sample

    if not asked.heldout.data:
        return []
    held = asked.heldout
    questions = file_questions(held.data[0], held.reward, limit=SHOWN)
    engine = _engine(model)
    prompts = [ask(engine.tokenizer, item.messages, item.tools, held.enable_thinking) for item in questions.items]
    replies = [one[0].text for one in sample(engine, prompts, SamplingParams(max_tokens=held.max_tokens), 1)]
    marks = questions.grade(questions.items, [item.messages for item in questions.items], replies)
    return [
        {"question": item.messages[-1]["content"], "answer": reply, "expected": item.right, "correct": mark >= 1}
        for item, reply, mark in zip(questions.items, replies, marks, strict=True)
    ]


def _next(asked: ReasonRecipe, model: str) -> list[str]:
    data = " ".join(f"--data {path}" for path in asked.heldout.data)
    return [f"groundup eval {model} {data} --strategy majority --budget 16"] if data else []
