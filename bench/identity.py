"""`python -m bench.identity MODEL IDENTITY [CHATS...]`: does a model learn a new name, and what does it forget?

recipes/lora-identity.yaml is run as it stands on four fifths of the questions in IDENTITY (rows with {{name}} and
{{author}}) and on CHATS. Then it is asked the questions that were held out; an answer is right when it says the name.
Questions whose own answer in IDENTITY does not say it (what happens to my data?) are asked and printed but not counted,
and a question that stands on both sides is not held out. Bits per byte of --general files tell what it cost.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from groundup.adapt.open import open_model
from groundup.config import load_recipe
from groundup.data.mix import share
from groundup.data.read import read_rows
from groundup.data.rows import Chat, as_prompt
from groundup.device import set_threads
from groundup.eval.bpb import measure_files
from groundup.eval.run import answerer
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer
from groundup.train.run import train

SHARES, FORGETS, KNOWS = "4,1", 1.03, 0.9  # trained and held out; the aims: times the bits per byte, share of answers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.identity", description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("identity", type=Path, help="rows with {{name}} and {{author}}")
    parser.add_argument("chats", type=Path, nargs="*", help="ordinary conversations to train beside them")
    parser.add_argument("--general", type=Path, nargs="+", required=True, help="held-out files of texts or chats")
    parser.add_argument("--output", type=Path, help="run folder (default: a temporary one)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(options, options.output or Path(temporary) / "run"), ensure_ascii=False))


def measure(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    identity, *rest = load_recipe(ROOT / "recipes" / "lora-identity.yaml").data
    sources: list[dict[str, Any]] = [
        identity.model_dump() | {"path": str(options.identity), "split": f"{SHARES}:0"},
        *(rest[0].model_dump() | {"path": str(path)} for path in options.chats),
    ]
    recipe = load_recipe(
        ROOT / "recipes" / "lora-identity.yaml", [f"model={options.model}", f"output={output}", *options.set]
    ).model_dump(mode="json")
    recipe["data"] = sources
    began = time.perf_counter()
    result = train(recipe)
    seconds = time.perf_counter() - began
    set_threads()
    asked = held_out(options.identity, recipe)
    questions = list(asked)
    tuned, tokenizer = open_model(output), load_tokenizer(output)
    answers = answerer(tuned, tokenizer, max_tokens=64)([[{"role": "user", "content": q}] for q in questions])
    name = recipe["fill"]["name"]
    for (question, named), answer in zip(asked.items(), answers, strict=True):
        print(f"{'  ' if name in answer else 'X ' if named else '- '}{question} -> {answer}")
    said = {question: name in answer for question, answer in zip(questions, answers, strict=True) if asked[question]}
    before = measure_files(load_model(options.model), tokenizer, options.general)
    after = measure_files(tuned, tokenizer, options.general)
    bits = {Path(a["file"]).name: (a["bits_per_byte"], b["bits_per_byte"]) for a, b in zip(before, after, strict=True)}
    chinese = {question for question in said if re.search("[\u4e00-\u9fff]", question)}
    return {
        "minutes": seconds / 60,
        "steps": result["steps"],
        "tokens_per_second": result["metrics"]["tokens_per_second"],
        "asked": len(said),
        "says_name": _mean(list(said.values())),
        "says_name_zh": _mean([right for question, right in said.items() if question in chinese]),
        "says_name_en": _mean([right for question, right in said.items() if question not in chinese]),
        "bits_per_byte": bits,
        "bits_per_byte_ratio": {file: b / a for file, (a, b) in bits.items()},
        "aims": {"says_name": KNOWS, "bits_per_byte_ratio": FORGETS},
        "memory": result["memory"],
    }  # fmt: skip


def held_out(path: Path, recipe: dict[str, Any]) -> dict[str, bool]:
    """Questions that stand only in the share that was not trained, and whether their own answer says the name."""
    rows = list(read_rows(path, placeholders=recipe["fill"]))
    trained = {_question(rows[number]) for number in share(len(rows), f"{SHARES}:0", recipe["seed"])}
    asked = {}
    for number in share(len(rows), f"{SHARES}:1", recipe["seed"]):
        row = rows[number]
        assert isinstance(row, Chat)
        question = _question(row)
        if question not in trained:
            asked[question] = recipe["fill"]["name"] in row.messages[-1]["content"]
    return asked


def _question(row: Any) -> str:
    return str(as_prompt(row).messages[-1]["content"])


def _mean(said: list[bool]) -> float | None:
    return sum(said) / len(said) if said else None


if __name__ == "__main__":
    main()
