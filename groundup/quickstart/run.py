"""How do the parts make one run? Tokenizer, pretraining, SFT, evaluation and a report, within a budget of minutes.

Every step's result stands in the output folder's quickstart.json before the next one starts, and the two trainings have
checkpoints of their own, so the same command again goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from groundup.config import Recipe, build_recipe
from groundup.data.language import language
from groundup.errors import UserError
from groundup.files import write_json
from groundup.plan.budget import OPTIM, measure_step, plan_quickstart
from groundup.quickstart.corpus import SAMPLE, Corpus, OwnData, WorldData
from groundup.tokenizer import Tokenizer, report, train_tokenizer
from groundup.train.run import STAGES, train

FULL = 10.0  # minutes; with fewer, the stages after fine-tuning are shorter, too
FIRST = ("pretrain", "sft")  # the stages that make a model of nothing


def quickstart(
    minutes: float = 10.0,
    data: list[str] | None = None,
    depth: int | None = None,
    seed: int = 0,
    output: str | Path = "out/quickstart",
    full: bool = False,
) -> dict[str, Any]:
    """Run everything and return what report.json holds.

    minutes: training time in all. data: files in any known format (text to pretraining, chats to SFT) instead of the
    built-in world. depth: layers, instead of what fits the budget. full: go on through reward model, DPO, PPO, GRPO,
    distillation and votes (full.py), on the built-in world alone. UserError where an input cannot be used.
    """
    if minutes <= 0:
        raise UserError("--minutes", f"{minutes:g} is no budget", "give a positive number of minutes")
    own = [str(path) for path in data or []]
    if full and own:
        raise UserError("--full", "needs the built-in world, whose answers can be graded", "leave --data out")
    settings = {"minutes": minutes, "data": own, "depth": depth, "seed": seed}
    steps = Journal(Path(output), settings)
    corpus: Corpus = OwnData(own) if own else WorldData(Path(output) / "data", seed)
    return _run(steps, corpus, settings, full)


Differs = Callable[[Path, dict[str, Any], dict[str, Any]], UserError]


class Journal:
    """quickstart.json: what was asked, and each finished step's result.

    file: another name of it. differs: what to say where the folder was started with other settings.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], file: str = "quickstart.json", differs: Differs | None = None
    ) -> None:
        self.output, self.path = output, output / file
        self.state: dict[str, Any] = {"settings": settings, "steps": {}}
        if self.path.exists():
            try:
                self.state = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(
                    self.path, "is not JSON any more", "remove the folder, or choose another --output"
                ) from None
            if differs is not None and self.state["settings"] != settings:
                raise differs(output, self.state["settings"], settings)
            for key, value in self.state["settings"].items():
                if settings[key] != value:
                    asked = f"--{key} {value}" if value not in (None, []) else f"without --{key}"
                    raise UserError(output, f"was started with {asked}", "give the same, or choose another --output")
        else:
            write_json(self.path, self.state)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The step's result: from the journal when it is done, else by doing it and writing it down."""
        if name not in self.state["steps"]:
            say(name)
            self.state["steps"][name] = work()
            write_json(self.path, self.state)
        return self.state["steps"][name]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _run(steps: Journal, corpus: Corpus, settings: dict[str, Any], full: bool) -> dict[str, Any]:
    """All steps in order; each is skipped when the journal has it."""
    from groundup.device import describe, keep_memory, set_threads
    from groundup.eval.report import write_report
    from groundup.quickstart.full import STAGES as AFTER
    from groundup.quickstart.full import Tuned, row
    from groundup.tokenizer import load_tokenizer
    from groundup.world import World

    output = steps.output
    set_threads()
    keep_memory()
    machine = steps.step("look at the machine", describe)
    words = steps.step("tokenizer", lambda: _train_tokenizer(corpus, output / "tokenizer"))
    tokenizer = load_tokenizer(output / "tokenizer")
    plan = steps.step("plan", lambda: _plan(corpus, tokenizer, settings))
    for line in plan["lines"]:
        say(line)
    files = steps.step("data", lambda: asdict(corpus.files(tokenizer, plan["tokens"])))
    baseline = steps.step("copying baseline", corpus.baseline)
    stages, model = [{"name": "tokenizer", **words}], f"depth-{plan['depth']}"
    for name in (name for name in FIRST if files[name]):
        recipe = _recipe(name, model, files[name], plan, settings, output)
        say(f"{name}, {plan['stages'][name]['seconds'] / 60:.1f} minutes")
        result = train(recipe)
        model = result["output"]
        held = steps.step(f"evaluate {name}", partial(_evaluate, corpus, output, plan, settings, files, model))
        figures = {key: result[key] for key in ("name", "seconds", "tokens", "steps", "parameters")}
        stages.append({**figures, "metrics": {**result["metrics"], **held}})
    samples = steps.step("sample answers", lambda: _samples(corpus, model))
    told = {
        "title": "groundup quickstart",
        "machine": machine,
        "derived": plan["derived"],
        "baseline": baseline,
        "samples": samples,
        "curves": {name: output / name / "metrics.jsonl" for name in FIRST if files[name]},
        "next_commands": [
            f"groundup chat {model}",
            f"groundup eval {model}" + ("" if settings["data"] else " --world"),
        ],
    }

    def written() -> dict[str, Any]:
        """The report with the rows that are there so far, whichever run they are from."""
        done = steps.state["steps"]
        return write_report(output, {**told, "stages": [*stages, *(done[name] for name in AFTER if name in done)]})

    report = written()
    if full:
        tuned = Tuned(model, output, World(settings["seed"]), settings["seed"], min(1.0, settings["minutes"] / FULL))
        for name in AFTER:
            steps.step(name, partial(row, name, tuned))
            report = written()
    return report


def _train_tokenizer(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """The tokenizer, and its figures as a stage of the report."""
    began = time.perf_counter()
    tokenizer = train_tokenizer(corpus.texts(), corpus.vocab_size)
    tokenizer.save(folder)
    sample: dict[str, list[str]] = {"zh": [], "en": []}
    for text in islice(corpus.texts(), SAMPLE):
        sample.setdefault(language(text), []).append(text)
    measured = {name: figures for name, figures in report(tokenizer, sample).items() if figures["texts"]}
    metrics = {f"chars_per_token_{name}": figures["chars_per_token"] for name, figures in measured.items()}
    tokens = sum(int(figures["tokens"]) for figures in measured.values())
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "metrics": metrics}


def _plan(corpus: Corpus, tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """Model size, tokens, steps and learning rates, from the minutes and this machine's measured speed."""
    plan = plan_quickstart(
        settings["minutes"],
        settings["depth"],
        tokenizer.vocab_size,
        available=corpus.sizes(tokenizer),
        tokens_per_second=measure_step,
    )
    return {
        "depth": plan.depth,
        "seq_len": plan.seq_len,
        "batch_size": plan.batch_size,
        "stages": {"pretrain": asdict(plan.pretrain), "sft": asdict(plan.sft)},
        "tokens": {"pretrain": plan.pretrain.tokens, "sft": plan.sft.tokens},
        "lines": plan.lines(),
        "derived": {"minutes": settings["minutes"], **plan.derived()},
    }


def _recipe(
    stage: str, model: str, files: list[str], plan: dict[str, Any], settings: dict[str, Any], output: Path
) -> Recipe:
    """The recipe of one stage; it is saved in the stage's folder and can be run by `groundup train` as it is."""
    own = plan["stages"][stage]
    return build_recipe(
        {
            "stage": stage,
            "model": model,
            "tokenizer": str(output / "tokenizer"),
            "data": files,
            "output": str(output / stage),
            "cache": str(output / "cache"),
            "seed": settings["seed"],
            "train": {"steps": own["steps"], "batch_size": plan["batch_size"], "seq_len": plan["seq_len"]},
            "optim": {**OPTIM, "lr": own["lr"], "muon_lr": own["muon_lr"]},
            "log": {"every": max(1, own["steps"] // 100)},
        }
    )


def _evaluate(
    corpus: Corpus,
    output: Path,
    plan: dict[str, Any],
    settings: dict[str, Any],
    files: dict[str, list[str]],
    model: str,
) -> dict[str, Any]:
    """What a stage's model knows: graded questions, and bits per byte on the held-out rows of both stages."""
    from groundup.eval.bpb import measure
    from groundup.eval.run import answerer
    from groundup.quickstart.figures import opened

    loaded, tokenizer = opened(model)
    metrics = corpus.evaluate(answerer(loaded, tokenizer))
    for stage, key in (("pretrain", "text_bits_per_byte"), ("sft", "chat_bits_per_byte")):
        if files[stage]:
            recipe = _recipe(stage, model, files[stage], plan, settings, output)
            _, held_out = STAGES[stage].open(recipe, tokenizer, output / "cache")
            if held_out is not None:
                metrics[key] = measure(loaded, held_out)["bits_per_byte"]
    return metrics


def _samples(corpus: Corpus, model: str) -> list[dict[str, str]]:
    """A few questions with the model's answers."""
    from groundup.eval.run import answerer
    from groundup.quickstart.figures import opened

    asked = corpus.samples()
    answer = answerer(*opened(model))
    replies = answer([[{"role": "user", "content": sample["question"]}] for sample in asked])
    for sample, reply in zip(asked, replies, strict=True):
        say(f"{sample['question']!r} -> {reply!r}")
    return [{**sample, "answer": reply} for sample, reply in zip(asked, replies, strict=True)]
