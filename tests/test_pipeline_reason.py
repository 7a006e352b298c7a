"""From a chat model to one that thinks: what is kept of its samples, and that nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.config.reason import SampleConfig, build_reason, load_reason
from groundup.config.rl import RewardSpec
from groundup.data.read import read_rows
from groundup.data.rows import Chat, Unpaired
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.pipeline import sample as sampling
from groundup.pipeline.readable import fault
from groundup.pipeline.reason import reason
from groundup.pipeline.sample import sample_rows
from groundup.tokenizer import load_tokenizer, train_tokenizer
from groundup.train.run import train

ROOT = Path(__file__).parent.parent
SUMS = [(a, b) for a in range(1, 7) for b in range(1, 7)]


def rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro model that has learnt to think `a and b` and to answer `b`, its tokenizer, and rows of every kind."""
    root = tmp_path_factory.mktemp("reason")
    torch.set_num_threads(1)
    said = [
        {
            "messages": [
                {"role": "user", "content": f"say {a} {b}"},
                {"role": "assistant", "content": str(b), "reasoning_content": f"{a} and {b}"},
            ]
        }
        for a, b in SUMS
    ]
    rows(root / "thoughts.jsonl", said)
    rows(root / "general.jsonl", [
        {"messages": [{"role": "user", "content": f"hi {a}"}, {"role": "assistant", "content": f"yes {b}"}]}
        for a, b in SUMS
    ])  # fmt: skip
    asked = [{"question": f"say {a} {b}", "answer": str(b), "kind": "say"} for a, b in SUMS]
    rows(root / "prompts.jsonl", asked[::2])
    rows(root / "heldout.jsonl", asked[1::4])
    train_tokenizer([json.dumps(row) for row in said] * 3, 300).save(root / "tok")
    tokenizer = load_tokenizer(root / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 128, 2, 2, 1, 32, max_position_embeddings=128))
    model.init_weights(0)
    save_model(model, root / "start")
    tokenizer.save(root / "start")
    recipe = {
        "stage": "sft", "model": str(root / "start"), "data": str(root / "thoughts.jsonl"),
        "output": str(root / "model"), "cache": str(root / "cache"), "eval": {"fraction": 0},
        "train": {"steps": 60, "seq_len": 128, "batch_size": 4, "threads": 1, "device": "cpu"},
        "optim": {"lr": 1e-2}, "log": {"plots": False},
    }  # fmt: skip
    train(recipe, peak=1e9)
    return root


def settings(ground: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A pipeline of seconds."""
    paths = {name: str(ground / f"{name}.jsonl") for name in ("thoughts", "prompts", "general")}
    return {
        "model": str(ground / "model"), "output": str(output), "cache": str(ground / "cache"), **paths,
        "shared": {
            "train": {"steps": 3, "seq_len": 64, "batch_size": 2, "threads": 1, "device": "cpu", "save_every": 2},
            "optim": {"lr": 1e-4}, "eval": {"fraction": 0}, "log": {"plots": False},
            "rl": {"prompts": 2, "group_size": 2, "max_tokens": 24, "rewards": ["exact"]},
        },
        "grpo_all": {"train": {"steps": 2}},
        "sample": {"n": 3, "max_tokens": 24, "temperature": 0.7},
        "heldout": {"data": [str(ground / "heldout.jsonl")], "max_tokens": 24},
        **changes,
    }  # fmt: skip


CONFIG = SampleConfig(n=3, keep=2, max_tokens=24, temperature=0.7, rewards=[RewardSpec(name="exact")])


@pytest.mark.parametrize(
    ("question", "reply", "wanted"),
    [
        ("How many?", "<think>\n3 and 4 make 7.\n</think>\n\n7", None),
        ("How many?", "<think>\n3 and 4 make", "no thought"),
        ("How many?", "7", "no thought"),
        ("How many?", "<think>\n\n</think>\n\n7", "no thought"),
        ("How many?", "First 3, and then 4 more make 7.\nThe answer is 7.", None),
        ("How many are there?", "<think>\n三个加四个等于七个。\n</think>\n\n7", "language"),
        ("一共几个？", "<think>\n三个加四个等于七个。\n</think>\n\n7", None),
        ("一共几个？", "<think>\nThree and four make seven of them.\n</think>\n\n七", "language"),
        ("7+8=?", "<think>\n7+8=15.\n</think>\n\n15", None),
        ("How many?", "<think>\n" + "wait, let me think about it again. " * 6 + "\n</think>\n\n7", "repetition"),
    ],
)
def test_what_is_readable(question: str, reply: str, wanted: str | None) -> None:
    assert fault(question, reply, SampleConfig()) == wanted
    allowing = SampleConfig(thought=False, least_language=0, most_repeated=1)
    assert fault(question, reply, allowing) is None


def test_kept_are_the_right_ones(ground: Path, tmp_path: Path) -> None:
    """Every kept row answers its prompt rightly, after a thought, and is read as a conversation to learn from."""
    found = sample_rows(ground / "model", [str(ground / "prompts.jsonl")], tmp_path / "kept.jsonl", CONFIG, seed=1)
    assert found["prompts"] == 18 and found["samples"] == 54
    kept = [row for row in read_rows(tmp_path / "kept.jsonl") if isinstance(row, Chat)]
    assert len(kept) == found["kept"] > 5
    for row in kept:
        asked, answered = row.messages
        assert answered["content"].strip(" .") == asked["content"].split()[-1] and answered["reasoning_content"]
    texts = [json.dumps(row.messages) for row in kept]
    assert len(texts) == len(set(texts)), "none twice"
    assert found["kept"] + sum(found["rejected"].values()) == 54
    assert 0 < found["right"] <= found["answered"] <= 1


def test_sampling_goes_on_where_it_was(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any line, it ends in the same bytes; other settings are refused; a finished file is left alone."""
    monkeypatch.setattr(sampling, "CHUNK", 5)
    prompts, whole = [str(ground / "prompts.jsonl")], tmp_path / "whole.jsonl"
    asked = sample_rows(ground / "model", prompts, whole, CONFIG, seed=1)
    chunks: list[int] = []
    chunk = sampling._chunk

    def dying(*arguments: Any) -> Any:
        chunks.append(len(arguments[1]))
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return chunk(*arguments)

    monkeypatch.setattr(sampling, "_chunk", dying)
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_rows(ground / "model", prompts, cut, CONFIG, seed=1)
    part = tmp_path / "cut.jsonl.part.jsonl"
    assert len(part.read_text(encoding="utf-8").splitlines()) == 1 + 10 and not cut.exists()
    part.write_bytes(part.read_bytes()[:-40])  # in the middle of a line, and of a chunk
    with pytest.raises(UserError, match="was started with n=3, not 4"):
        sample_rows(ground / "model", prompts, cut, CONFIG.model_copy(update={"n": 4}), seed=1)
    chunks.clear()
    monkeypatch.setattr(sampling, "_chunk", lambda *given: chunks.append(len(given[1])) or chunk(*given))
    again = sample_rows(ground / "model", prompts, cut, CONFIG, seed=1)
    assert sum(chunks) == 18 - 9
    assert cut.read_bytes() == whole.read_bytes() and not part.exists()
    same = ("prompts", "samples", "right", "answered", "kept", "rejected", "tokens")
    assert {key: again[key] for key in same} == {key: asked[key] for key in same}
    assert sample_rows(ground / "model", prompts, cut, CONFIG, seed=1)["already_finished"]
    with pytest.raises(UserError, match="seed=1, not 2"):
        sample_rows(ground / "model", prompts, cut, CONFIG, seed=2)
    with pytest.raises(UserError, match="not made by this command"):
        sample_rows(ground / "model", prompts, ground / "general.jsonl", CONFIG)


def test_nothing_to_keep_is_said(ground: Path, tmp_path: Path) -> None:
    picky = CONFIG.model_copy(update={"least": 2.0})
    with pytest.raises(UserError, match=r"none of 54 samples was kept \(.*wrong"):
        sample_rows(ground / "model", [str(ground / "prompts.jsonl")], tmp_path / "kept.jsonl", picky)


def test_the_sample_command(groundup: Callable, ground: Path, tmp_path: Path) -> None:
    given = ["sample", ground / "model", ground / "prompts.jsonl", "--output", tmp_path / "kept.jsonl", "--limit", 9]
    found = groundup(*given, "--n", 6, "--max-tokens", 24, "--temperature", 1.0, "--judged", "--json")
    assert found.code == 0, found.err
    assert found.json()["prompts"] == 9 and (tmp_path / "kept.jsonl").is_file()
    judged = [row for row in read_rows(tmp_path / "kept.judged.jsonl") if isinstance(row, Unpaired)]
    assert {row.label for row in judged} == {True, False}, "a verifier learns from both"
    for row in judged:
        said = row.messages[-1]["content"].rpartition("</think>")[2]
        assert row.label == (said.strip(" .") == row.messages[0]["content"].split()[-1])


def test_the_whole_road(ground: Path, tmp_path: Path) -> None:
    """Each stage begins where it should; the report has a row for each; the same command does nothing again."""
    output = tmp_path / "out"
    report = reason(build_reason(settings(ground, output)))
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["start", "cold start", "grpo", "sample", "sft", "grpo all"]
    for stage in report["stages"]:
        wanted = {"samples_right", "rows_kept"} if stage["name"] == "sample" else {"answers_right", "thinks"}
        assert wanted <= stage["metrics"].keys()
    begun = {name: load_yaml(output / name / "recipe.yaml") for name in ("cold_start", "grpo", "sft", "grpo_all")}
    assert begun["cold_start"]["model"] == begun["sft"]["model"] == str(ground / "model"), "sft begins anew, as R1's"
    assert begun["grpo"]["model"] == str(output / "cold_start") and begun["grpo_all"]["model"] == str(output / "sft")
    assert [source["path"] for source in begun["sft"]["data"]] == [
        str(output / "sample" / "kept.jsonl"),
        str(ground / "general.jsonl"),
    ]
    assert begun["sft"]["train"]["steps"] == 3 and begun["grpo_all"]["train"]["steps"] == 2
    page = (output / "report.md").read_text(encoding="utf-8")
    assert "| cold start |" in page and "right answers" in page and "say " in page
    weights = (output / "grpo_all" / "model.safetensors").read_bytes()
    stamp = (output / "grpo_all" / "model.safetensors").stat().st_mtime_ns
    assert reason(build_reason(settings(ground, output)))["stages"] == report["stages"]
    assert (output / "grpo_all" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"started with kept_weight=1\.0, not 2\.0"):
        reason(build_reason(settings(ground, output, kept_weight=2.0)))
    for left in ("grpo_all", "sample"):  # what a kill leaves of it: nothing
        for path in sorted((output / left).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    again = reason(build_reason(settings(ground, output)))
    assert (output / "grpo_all" / "model.safetensors").read_bytes() == weights
    assert [stage["name"] for stage in again["stages"]] == names


def load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_an_adapter_becomes_a_model_for_the_next_stage(ground: Path, tmp_path: Path) -> None:
    changes = settings(ground, tmp_path / "out", restart=False)
    changes["shared"]["adapt"] = {"method": "lora", "rank": 2, "alpha": 4}
    report = reason(build_reason(changes))
    assert [stage["name"] for stage in report["stages"]][-1] == "grpo all"
    merged = tmp_path / "out" / "grpo" / "merged"
    assert (merged / "model.safetensors").is_file()
    assert load_yaml(tmp_path / "out" / "sft" / "recipe.yaml")["model"] == str(merged), "restart=false"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"thoughs": "a"}, "did you mean thoughts"),
        ({"sft": {"train": {"step": 3}}}, "did you mean train.steps"),
        ({"grpo": {"model": "x"}}, "decided by the pipeline"),
        ({"sft": {"rl": {"prompts": 3}}}, "does not read the section rl"),
        ({"sample": {"n": 0}}, "sample.n"),
        ({"thoughts": []}, "thoughts"),
        ({"heldout": {"limits": 3}}, "did you mean heldout.limit"),
    ],
)
def test_faults_of_the_recipe(ground: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_reason(settings(ground, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_faults_of_files_are_found_first(ground: Path, tmp_path: Path) -> None:
    for name, wrong, said in (
        ("general", "prompts", "conversations are needed"),
        ("prompts", "general", "questions with answers are needed"),
        ("thoughts", "missing", "missing"),
    ):
        given = settings(ground, tmp_path / "out", **{name: str(ground / f"{wrong}.jsonl")})
        with pytest.raises(UserError, match=said):
            reason(build_reason(given))
    assert not (tmp_path / "out").exists()


def test_the_recipe_that_ships(ground: Path) -> None:
    """Its keys are known, its files are those that `groundup world` writes, and a command line changes them."""
    from groundup.world import World

    asked = load_reason(ROOT / "recipes" / "reason.yaml", ["grpo.train.steps=7", f"model={ground / 'model'}", "seed=3"])
    assert asked.grpo["train"]["steps"] == 7 and asked.model == str(ground / "model")
    assert asked.recipe("grpo", "m", [{"path": "a"}]).train.steps == 7
    files = [s.path for s in (*asked.thoughts, *asked.prompts, *asked.general, *asked.general_prompts)]
    written = World(0).write(ground / "world", documents=2, chats=2, later=4)
    assert {Path(path).name for path in [*files, *asked.heldout.data]} <= written.keys()
    thought = next(iter(read_rows(ground / "world" / "thoughts.jsonl")))
    assert isinstance(thought, Chat) and thought.messages[-1]["reasoning_content"]


def test_the_command(groundup: Callable, ground: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "reason.yaml"
    recipe.write_text(json.dumps(settings(ground, tmp_path / "out")), encoding="utf-8")  # JSON is YAML
    wrong = groundup("pipeline", "reason", recipe, "sample.m=3")
    assert wrong.code == 2 and "unknown key sample.m" in wrong.err
    assert groundup("pipeline", "reason", tmp_path / "reasons.yaml").code == 2
