"""`python -m bench.countdown MODEL WARM PUZZLES`: how far does a small chat model get on countdown within half an hour?

WARM holds worked solutions to imitate (rows of conversations), PUZZLES rows of {target, nums}. The short solutions of
three numbers are imitated through a LoRA, which is merged; then GRPO goes on, the reward counted out by rule. The
curve is what a greedy answer to held-out puzzles is worth: of MODEL, after the imitation, and as GRPO goes. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from groundup.adapt.merge import merge
from groundup.adapt.open import open_model
from groundup.config import load_recipe
from groundup.data.read import read_rows
from groundup.data.rows import Chat, Prompt
from groundup.eval.run import answerer
from groundup.rewards.countdown import countdown
from groundup.tokenizer import load_tokenizer
from groundup.train.run import train

NUMBERS, HELD_OUT = 3, 96  # of a puzzle; puzzles to look at
REWARD = {"name": "countdown", "args": {"partial": 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.countdown", description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("warm", type=Path, help="worked solutions, as conversations")
    parser.add_argument("puzzles", type=Path, help="rows of {target, nums}")
    parser.add_argument("--longest", type=int, default=400, help="characters of a solution that is imitated (400)")
    parser.add_argument("--tokens", type=int, default=192, help="of an answer (192)")
    parser.add_argument("--steps", type=int, default=100, help="of the imitation, 1,024 tokens each (100)")
    parser.add_argument("--rounds", type=int, default=20, help="of GRPO, 8 answers to each of 6 puzzles (20)")
    parser.add_argument("--output", type=Path, help="run folder (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(options, options.output or Path(temporary))))


def measure(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    warm = [row for row in read_rows(options.warm) if isinstance(row, Chat) and fits(row, options.longest)]
    known = {tuple(numbers(row.messages[0]["content"])) for row in warm}
    asking = warm[0].messages[0]["content"]
    puzzles = [row for row in puzzle_rows(options.puzzles, asking) if (*row["nums"], row["target"]) not in known]
    held, asked = puzzles[:HELD_OUT], puzzles[HELD_OUT:]
    files = {"warm": [{"messages": row.messages} for row in warm], "puzzles": asked, "held-out": held}
    paths = {name: str(write(output / f"{name}.jsonl", rows)) for name, rows in files.items()}
    began, spent = time.perf_counter(), time.process_time()
    curve = {"before": accuracy(options.model, held, options.tokens)}
    adapter = train(load_recipe(ROOT / "recipes" / "sft-lora.yaml", [
        f"model={options.model}", f"data={paths['warm']}", f"output={output / 'warm'}", f"train.steps={options.steps}",
        "train.epochs=1", "train.seq_len=1024", "train.batch_size=1", "train.accumulate=1", "eval.fraction=0",
        "optim.lr=5e-4",
    ]))["output"]  # fmt: skip
    start = output / "start"
    if not start.exists():
        merge(options.model, [(adapter, 1.0)], start)
    curve["imitated"] = accuracy(start, held, options.tokens)
    imitated = time.perf_counter() - began
    recipe = load_recipe(ROOT / "recipes" / "grpo-lora.yaml", [
        f"model={start}", f"data={paths['puzzles']}", f"output={output / 'grpo'}", f"train.steps={options.rounds}",
        f"eval.data={paths['held-out']}", f"train.eval_every={max(1, options.rounds // 4)}",
        f"rl.max_tokens={options.tokens}", f"rl.rewards={json.dumps([REWARD])}", "rl.prompts=6", "rl.beta=0",
    ])  # fmt: skip
    done = train(recipe)
    curve["reinforced"] = accuracy(Path(done["output"]), held, options.tokens)
    lines = [json.loads(line) for line in (output / "grpo" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "right": curve,
        "rewards": [round(line["reward"], 3) for line in lines if "reward" in line],
        "held_out_reward": {line["step"]: round(line["val_reward"], 3) for line in lines if "val_reward" in line},
        "solutions": len(warm), "puzzles": len(asked), "held_out": len(held),
        "minutes": (time.perf_counter() - began) / 60,
        "minutes_of_imitation": imitated / 60,
        "cpu_minutes": (time.process_time() - spent) / 60,
    }  # fmt: skip


def fits(row: Chat, longest: int) -> bool:
    return len(numbers(row.messages[0]["content"])) == NUMBERS + 1 and len(row.messages[-1]["content"]) <= longest


def numbers(question: str) -> list[int]:
    """The numbers of a puzzle, and its target behind them."""
    inside, target = re.search(r"\[(.*?)\].*?equals (-?\d+)", question, re.DOTALL).groups()  # type: ignore[union-attr]
    return [*map(int, inside.split(",")), int(target)]


def puzzle_rows(path: Path, asking: str) -> Iterator[dict[str, Any]]:
    """Puzzles of so many numbers, asked in the words of the solutions."""
    for row in read_rows(path):
        assert isinstance(row, Prompt)
        nums, target = row.extra["nums"], row.extra["target"]
        if len(nums) == NUMBERS:
            question = re.sub(r"\[.*?\]", str(nums), asking, count=1)
            question = re.sub(r"equals -?\d+", f"equals {target}", question, count=1)
            yield {"prompt": [{"role": "user", "content": question}], "nums": nums, "target": target}


def accuracy(model: Path, puzzles: list[dict[str, Any]], tokens: int) -> float:
    answers = answerer(open_model(model), load_tokenizer(model), max_tokens=tokens)([row["prompt"] for row in puzzles])
    nums, targets = ([row[key] for row in puzzles] for key in ("nums", "target"))
    return statistics.mean(score or 0.0 for score in countdown([], answers, nums, targets))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
