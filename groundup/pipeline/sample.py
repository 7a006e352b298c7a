"""What did the model itself say that is worth learning? Rejection sampling: many answers, and the good ones are kept.

Right is what the rewards say, readable what readable.py says; equal answers to a prompt are kept once. The output is a
file of conversations for SFT, written at the end; what is done so far stands beside it, a line a prompt, so the same
command goes on where it was and ends in the same bytes. With `judged` all answers are kept in a second file, each with
whether it is right: what an outcome verifier is trained on (recipes/reward-verifier.yaml).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.config import SourceConfig
from groundup.config.reason import SampleConfig
from groundup.errors import UserError
from groundup.eval.prompts import Item
from groundup.eval.questions import Grade, grader, read_items
from groundup.files import explain, write_atomic, write_json
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import SamplingParams
from groundup.infer.strategies import Sample, answered, ask, sample
from groundup.pipeline.readable import fault
from groundup.train.folder import first_difference
from groundup.train.start import fingerprint

CHUNK = 32  # prompts answered together, and lost at most when the run is killed
Say = Callable[[str], None]


def sample_rows(
    model: str | Path,
    prompts: Sequence[str | SourceConfig],
    output: str | Path,
    config: SampleConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Answer all prompts n times, keep what is right and readable, and write it as conversations.

    {"output", "prompts", "samples", "right" (share), "answered" (share of prompts with a right sample), "kept" (rows),
    "judged" (the file of all answers, "" without), "rejected": {reason: samples}, "tokens", "seconds"}; the same stands
    in OUTPUT.report.json. A finished output is left as it is. UserError: the output was started with other settings, or
    nothing was kept.
    """
    config, output = config or SampleConfig(), Path(output)
    paths = [str(one.path if isinstance(one, SourceConfig) else one) for one in prompts]
    sets = [_Prompts(read_items(path, config.limit), grader(config.rewards, path)) for path in paths]
    settings = {**_plain(config), "seed": seed, "prompts": _digest(sets), "model": _identity(model)}
    progress = _Progress(output, settings)
    if progress.finished is not None:
        return {**progress.finished, "already_finished": True}
    total = sum(len(one.items) for one in sets)
    with progress:
        if len(progress.lines) < total:
            _answer_all(model, sets, config, seed, device, progress, lambda n: say(f"{n} of {total} prompts"))
    return progress.finish()


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a file and who grades their answers."""

    items: list[Item]
    grade: Grade


def _answer_all(
    model: str | Path, sets: Sequence[_Prompts], config: SampleConfig, seed: int, device: str, progress: _Progress,
    done: Callable[[int], None],
) -> None:  # fmt: skip
    """Every prompt that has no line yet."""
    from groundup.adapt.open import open_model, open_tokenizer
    from groundup.device import pick_device, set_threads

    set_threads()
    engine = Engine(open_model(model, device=pick_device(device)), open_tokenizer(model), EngineSettings())
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=seed)
    skip = len(progress.lines)
    for one in sets:
        items, skip = one.items[skip:], max(0, skip - len(one.items))
        for begin in range(0, len(items), CHUNK):
            began = time.perf_counter()
            lines = _chunk(engine, items[begin : begin + CHUNK], one.grade, params, config)
            progress.add(lines, time.perf_counter() - began)
            done(len(progress.lines))


def _chunk(
    engine: Engine, items: list[Item], grade: Grade, params: SamplingParams, config: SampleConfig
) -> list[dict[str, Any]]:
    """A line for each prompt: the rows that are kept, and why the other samples are not."""
    asked = [ask(engine.tokenizer, item.messages, item.tools, config.enable_thinking) for item in items]
    drawn = sample(engine, asked, params, config.n)
    flat = [(item, one) for item, samples in zip(items, drawn, strict=True) for one in samples]
    marks = iter(grade([item for item, _ in flat], [item.messages for item, _ in flat], [one.text for _, one in flat]))
    lines = []
    for item, question, samples in zip(items, asked, drawn, strict=True):
        verdicts = [_verdict(item, one, next(marks), config) for one in samples]
        good = {one.text: None for one, why in zip(samples, verdicts, strict=True) if why is None}
        rejected = Counter(why for why in verdicts if why is not None)
        if spare := verdicts.count(None) - min(len(good), config.keep):
            rejected["repeated or beyond keep"] = spare
        rows = [{"messages": answered(question, text)} for text in list(good)[: config.keep]]
        if item.tools:
            rows = [{**row, "tools": item.tools} for row in rows]
        judged = []
        if config.judged:
            ended = {one.text: why != "wrong" for one, why in zip(samples, verdicts, strict=True) if why != "cut"}
            judged = [{"messages": answered(question, text), "label": label} for text, label in ended.items()]
        right = len(samples) - rejected["wrong"] - rejected["cut"]
        tokens = sum(one.tokens for one in samples)
        counts = {"samples": len(samples), "right": right, "rejected": rejected, "tokens": tokens}
        lines.append({"rows": rows, "judged": judged, **counts})
    return lines


def _verdict(item: Item, one: Sample, mark: float, config: SampleConfig) -> str | None:
    """Why a sample is not kept. None: it may be."""
    if not one.ended:
        return "cut"
    if not mark >= config.least:
        return "wrong"
    return fault(item.messages[-1]["content"], one.text, config)


class _Progress:
    """OUTPUT.part.jsonl: the settings, then a line a prompt. OUTPUT and OUTPUT.report.json are written at the end."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.part = output, output.with_name(f"{output.name}.part.jsonl")
        self.report = output.with_name(f"{output.name}.report.json")
        self.settings, self.lines, self.seconds = settings, list[dict[str, Any]](), 0.0
        self.finished: dict[str, Any] | None = None
        if self.report.exists() and output.exists():
            stored = _json(self.report.read_text(encoding="utf-8")) or {}
            self._same(stored.pop("settings", {}))
            self.finished = stored
        elif output.exists():
            raise UserError(output, "exists already, and was not made by this command", "choose another output")
        elif self.part.exists():
            first, *lines = list(_whole_lines(self.part)) or [{}]
            if first:
                self._same(first.get("settings", {}))
            for line in lines:
                self.seconds += line.pop("seconds", 0.0)
                self.lines.append(line)

    def _same(self, before: dict[str, Any]) -> None:
        different = first_difference(before, self.settings)
        if different:
            key, was, now = different
            fix = "give the same, or choose another output"
            raise UserError(self.output, f"was started with {key}={was}, not {now}", fix)

    def __enter__(self) -> None:
        """Ready to go on: with the lines that are whole, and no other."""
        write_atomic(self.part, "".join(map(_line, [{"settings": self.settings}, *self.lines])))
        self.file = self.part.open("a", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, lines: list[dict[str, Any]], seconds: float) -> None:
        self.lines += lines
        self.seconds += seconds
        try:
            self.file.writelines(_line({**line, "seconds": seconds / len(lines)}) for line in lines)
            self.file.flush()
        except OSError as error:
            raise explain(error, self.part) from error

    def finish(self) -> dict[str, Any]:
        rows, judged = ([row for line in self.lines for row in line[key]] for key in ("rows", "judged"))
        beside = self.output.with_name(f"{self.output.stem}.judged.jsonl")
        rejected: Counter[str] = Counter()
        for line in self.lines:
            rejected.update(line["rejected"])
        samples = sum(line["samples"] for line in self.lines)
        if not rows:
            why = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
            fix = "train longer first, or ask for less (least, --least)"
            raise UserError(self.output, f"none of {samples} samples was kept ({why})", fix)
        figures = {
            "output": str(self.output),
            "prompts": len(self.lines),
            "samples": samples,
            "right": sum(line["right"] for line in self.lines) / samples,
            "answered": sum(line["right"] > 0 for line in self.lines) / len(self.lines),
            "kept": len(rows),
            "judged": str(beside) if judged else "",
            "rejected": dict(rejected.most_common()),
            "tokens": sum(line["tokens"] for line in self.lines),
            "seconds": round(self.seconds, 3),
        }
        if judged:
            write_atomic(beside, "".join(map(_line, judged)))
        write_atomic(self.output, "".join(map(_line, rows)))
        write_json(self.report, {**figures, "settings": self.settings})
        self.part.unlink(missing_ok=True)
        return figures


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Up to the first line that a kill cut."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        value = _json(line)
        if not isinstance(value, dict):
            return
        yield value


def _plain(config: SampleConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _digest(sets: Sequence[_Prompts]) -> str:
    """Of all that is asked and graded."""
    digest = hashlib.sha256()
    for one in sets:
        for item in one.items:
            digest.update(json.dumps([item.messages, item.answer, item.columns], default=str).encode())
    return digest.hexdigest()[:16]


def _identity(model: str | Path) -> str:
    from groundup.model.hub import resolve

    return fingerprint(resolve(model))
