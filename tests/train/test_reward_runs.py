"""Runs of stage reward: what they learn, what they report, and what they write."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import figures, furthest, small_recipe, weights

from groundup.adapt.scored import open_scorer
from groundup.config import build_recipe
from groundup.data.batch import Batch
from groundup.dist import World
from groundup.errors import UserError
from groundup.infer.scoring import Scorer
from groundup.model.scored import load_scorer
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.train.reward import Reward, ends, with_pad
from groundup.train.stage import Place

Make = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, Any]]
GOOD, BAD = "cat", "dog"
PAIRED = {"accuracy", "longer_baseline", "calibration_error", "brier", "chosen_score", "rejected_score", "val_loss"}
SINGLE = {"accuracy", "majority_baseline", "calibration_error", "brier", "right_score", "wrong_score", "val_loss"}


@pytest.fixture(scope="session")
def judged(ground: Path) -> Path:
    """pairs.jsonl (the better answer says cat, the worse one dog and is longer), steps.jsonl, outcomes.jsonl."""
    rng, words = random.Random(3), "the sat on a mat and saw one red run far from home while".split()

    def said(word: str, more: int = 0) -> str:
        text = [rng.choice(words) for _ in range(rng.randint(1, 3) + more)]
        text.insert(rng.randrange(len(text) + 1), word)
        return " ".join(text)

    asked = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(150)]
    pairs = [{"prompt": q, "chosen": said(GOOD), "rejected": said(BAD, more=4)} for q in asked]
    steps, outcomes = [], []
    for number, question in enumerate(asked):
        labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 3))]
        told = [f"{rng.choice(words)} {GOOD if label else BAD}" for label in labels]
        steps.append({"prompt": question, "completions": told, "labels": labels})
        outcomes.append({"prompt": question, "completion": said(GOOD if number % 3 else BAD), "label": number % 3 > 0})
    for name, rows in (("pairs", pairs), ("steps", steps), ("outcomes", outcomes)):
        (ground / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ground


@pytest.fixture
def reward(judged: Path, tmp_path: Path) -> Make:
    """reward("pair", **{"train.steps": 3}) -> a recipe of a minute's learning."""

    def make(loss: str = "pair", **changes: Any) -> dict[str, Any]:
        name = {"process": "steps", "outcome": "outcomes"}.get(loss, "pairs")
        told = {"stage": "reward", "data": str(judged / f"{name}.jsonl"), "train.seq_len": 128, "eval.fraction": 0.2}
        values = small_recipe(judged, tmp_path, **{**told, **changes})
        values["reward"] = {"loss": loss, **values.get("reward", {})}
        return values

    return make


def chat(answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "the mat"}, {"role": "assistant", "content": answer}]


LONG = {"train.steps": 60, "train.eval_every": 60, "train.save_every": 60, "train.eval_rows": 99, "optim.lr": 1e-2}


@pytest.mark.parametrize("loss", ["pair", "divergence"])
def test_pairs_are_learnt_against_the_longer_answer(reward: Make, run: Run, loss: str) -> None:
    result = run(reward(loss, **LONG))
    metrics = result["metrics"]
    assert metrics.keys() >= PAIRED and metrics["longer_baseline"] < 0.1
    assert metrics["accuracy"] > 0.95 and metrics["chosen_score"] > metrics["rejected_score"]
    assert metrics["brier"] < 0.1 and 0 <= metrics["calibration_error"] < 0.2
    done = json.loads((Path(result["output"]) / "done.json").read_text())
    assert done["metrics"] == metrics
    lines = figures(result["output"])
    assert lines[0]["train_accuracy"] < lines[-2]["train_accuracy"] and lines[-2]["margin"] > 1
    good, bad = Scorer(result["output"], device="cpu").score([chat("a cat"), chat("on a dog and far from home")])
    assert good > bad + 1


@pytest.mark.parametrize(("loss", "judgements"), [("process", None), ("outcome", 150)])
def test_right_and_wrong_are_learnt(reward: Make, run: Run, loss: str, judgements: int | None) -> None:
    result = run(reward(loss, **LONG))
    metrics = result["metrics"]
    assert metrics.keys() >= SINGLE and metrics["accuracy"] > 0.95 > metrics["majority_baseline"] >= 0.5
    assert metrics["right_score"] > 0 > metrics["wrong_score"]
    scorer = Scorer(result["output"], device="cpu")
    if loss == "process":
        assert scorer.stepwise
        right, wrong = scorer.score_steps([(chat("")[:1], ["a cat", "on a dog"])])[0]
        assert right > 1 and wrong < -1
    else:
        right, wrong = scorer.score([chat("a cat"), chat("a dog")])
        assert right > 0 > wrong


def test_transformers_reads_the_result(reward: Make, run: Run, judged: Path, tmp_path: Path) -> None:
    """Also where the base did not say what pads."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    shutil.copytree(judged / "model", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    output = Path(run(reward(model=str(tmp_path / "base")))["output"])
    theirs, tokens = AutoModelForSequenceClassification.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert theirs.config.pad_token_id == tokens.pad_token_id
    chats = [chat("a cat"), chat("a dog far away")]
    padded = tokens.apply_chat_template(chats, tokenize=True, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        scores = theirs.eval()(**padded).logits.squeeze(-1).tolist()
    assert Scorer(output, device="cpu").score(chats) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("loss", ["pair", "divergence"])
def test_margin_and_centring_are_part_of_the_loss(reward: Make, loss: str, tmp_path: Path) -> None:
    stage, model = opened(reward(loss), tmp_path)
    centred, _ = opened(reward(loss, reward={"centring": 0.5}), tmp_path)
    apart, _ = opened(reward(loss, reward={"margin": 2.0}), tmp_path)
    batch = stage.train.row(0)
    with torch.no_grad():
        plain, count, _ = stage.loss(model, batch)
        scores_BT = model.scores_BT(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
        middle = 0.5 * sum(
            (a + b) ** 2 for a, b in zip(*(side.tolist() for side in ends(scores_BT, batch)), strict=True)
        )
        assert middle > 0.01
        assert centred.loss(model, batch)[0].item() == pytest.approx(plain.item() + middle, rel=1e-4)
        assert 0.1 < apart.loss(model, batch)[0] - plain < 2 * count, "a margin of 2 costs up to 2 a pair"


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_a_part_moves_and_the_score_head_with_it(reward: Make, run: Run, judged: Path, method: str) -> None:
    settings = reward(**{**LONG, "train.steps": 30})
    settings["adapt"] = {"method": method, "rank": 8} if method == "lora" else {"method": method, "last": 1}
    result = run(settings)
    assert result["metrics"]["accuracy"] > 0.9
    output = Path(result["output"])
    model = open_scorer(output)
    assert model.score.weight.abs().max() > 0.05
    before, after = load_file(judged / "model" / "model.safetensors"), model.state_dict()
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    if method == "lora":
        assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()
        assert moved and all(".layers." in name and "norm" not in name for name in moved)
    else:
        assert moved and all(".layers.1." in name for name in moved)


def test_a_reward_model_can_be_trained_on(reward: Make, run: Run) -> None:
    short = {**LONG, "train.steps": 12}
    first = run(reward(**short, output="first"))
    more = reward(output="more", model=first["output"], **{**short, "train.steps": 2, "optim.lr": 1e-9})
    second = run(more)
    assert second["metrics"]["accuracy"] == first["metrics"]["accuracy"]
    assert furthest(weights(first["output"]), weights(second["output"])) < 1e-5


def test_a_reward_model_cannot_be_made_to_write(reward: Make, run: Run, recipe: Make) -> None:
    output = run(reward())["output"]
    with pytest.raises(UserError, match="holds a reward model: it scores answers and writes none"):
        run(recipe(output="sft", model=output))


def test_killed_and_started_again_it_ends_in_the_same_bytes(reward: Make, run: Run) -> None:
    alone = run(reward(output="alone"))["output"]
    settings = reward(output="told")

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run(settings, progress=stop)
    again = run(settings)["output"]
    assert (Path(alone) / "model.safetensors").read_bytes() == (Path(again) / "model.safetensors").read_bytes()
    assert figures(alone) == figures(again)


def test_rows_at_once_or_one_after_another_are_the_same_step(reward: Make, run: Run) -> None:
    """From a model that has learnt something: in a fresh one, whose blocks do nothing yet, both sides of a pair are the
    same last token, and its gradient is rounding alone."""
    base = run(reward(output="base", **{"train.steps": 12}))["output"]
    told = {"model": base, "train.steps": 4, "optim.lr": 1e-3}
    outputs = [
        run(reward(output=name, **told, **{"train.batch_size": size, "train.accumulate": times}))["output"]
        for name, size, times in (("a", 4, 1), ("b", 1, 4))
    ]
    assert furthest(weights(base), weights(outputs[0])) > 1e-3
    assert furthest(*map(weights, outputs)) < 1e-5


@pytest.mark.parametrize("loss", ["pair", "divergence", "process", "outcome"])
def test_rows_of_a_batch_do_not_change_each_others_loss(reward: Make, loss: str, tmp_path: Path) -> None:
    stage, model = opened(reward(loss), tmp_path)
    rows = [stage.train.row(i) for i in range(3)]
    together = Batch(*(torch.cat([getattr(b, name) for b in rows]) for name in
                       ("input_ids_BT", "labels_BT", "position_ids_BT", "doc_ids_BT")))  # fmt: skip
    with torch.no_grad():
        total, count, told = stage.loss(model, together)
        parts = [stage.loss(model, batch) for batch in rows]
    assert total.item() == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-5)
    assert stage.count(together)[0] == int(count) == sum(int(part[1]) for part in parts)
    assert told["train_accuracy"].item() == sum(float(part[2]["train_accuracy"]) for part in parts)


def test_two_ranks_measure_what_one_does(reward: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of two ranks' shares, put together by hand."""
    settings = reward(**{"train.eval_rows": 99})
    stage, model = opened(settings, tmp_path)
    with torch.no_grad():
        whole, shares = stage.evaluate(model), []
        for rank in range(2):
            half, _ = opened(settings, tmp_path, World(rank, 2))
            monkeypatch.setattr(World, "sum", lambda self, values: shares.append(list(values)) or list(values))
            half.evaluate(model)
        monkeypatch.setattr(World, "sum", lambda self, values: [a + b for a, b in zip(*shares, strict=True)])
        assert stage.evaluate(model) == pytest.approx(whole, rel=1e-9)


def opened(settings: dict[str, Any], folder: Path, world: World | None = None) -> tuple[Reward, Any]:
    """The stage of a recipe, and a model with a head that says something."""
    from groundup.train.start import config_of, source_of, start, tokenizer_of

    torch.set_num_threads(1)
    recipe = build_recipe(settings)
    source = source_of(recipe)
    tokenizer = tokenizer_of(recipe, source)
    place = Place(torch.device("cpu"), world or World())
    stage = Reward(Reward.open(recipe, tokenizer, folder / "cache"), recipe, place, tokenizer)
    begun = start(recipe, config_of(recipe, source, tokenizer), source, tokenizer, torch.float32)
    model = stage.prepare(begun).eval()
    with torch.no_grad():
        model.score.weight.mul_(50)  # type: ignore[operator,union-attr]
    return stage, model


def test_an_untied_base_trains_without_its_own_head(reward: Make, run: Run, judged: Path, tmp_path: Path) -> None:
    from groundup.model.config import ModelConfig
    from groundup.model.io import save_model
    from groundup.model.transformer import Transformer

    tokenizer = load_tokenizer(judged / "model")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 1, 2, 1, 16, tie_word_embeddings=False))
    model.init_weights(0)
    save_model(model, tmp_path / "untied")
    tokenizer.save(tmp_path / "untied")
    result = run(reward(model=str(tmp_path / "untied")))
    size = sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel() + 32
    assert result["parameters"] == result["trained_parameters"] == size
    assert "lm_head.weight" not in weights(result["output"])
    assert load_scorer(result["output"]).config.tie_word_embeddings is False


def test_padding_is_never_what_a_chat_ends_with(judged: Path) -> None:
    own = load_tokenizer(judged / "model")
    assert with_pad(own) is own
    same = Tokenizer(own.backend, {**own.config, "pad_token": own.config["eos_token"]}, own.chat_template.rstrip("\n"))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if same.render(said).ids[-1] != same.pad_id:
        template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
        same = Tokenizer(own.backend, {**same.config}, template)
    assert same.render(said).ids[-1] == same.pad_id == same.eos_id
    assert with_pad(same).pad_id not in same.stop_ids


@pytest.mark.parametrize(("changes", "said"), [
    ({"reward": {"loss": "process", "margin": 1.0}}, "loss process does not read margin"),
    ({"reward": {"loss": "outcome", "centring": 0.1}}, "loss outcome does not read centring"),
    ({"adapt": {"method": "prompt"}, "train": {"seq_len": 64}}, "prompt saves virtual tokens and nothing beside them"),
    ({"reward": {"loss": "process"}}, "a row of kind Preference where a solution in judged steps"),
])  # fmt: skip
def test_what_cannot_be_is_said(reward: Make, run: Run, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run({**reward(), **changes})
