"""Runs of stage distill: every way of it learns, is the same however it is cut, and refuses what cannot be."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import make_stock
from safetensors.torch import load_file, save_file
from test_resume import NURSERY
from tokenizers import Tokenizer as Backend
from train_helpers import figures, furthest, small_recipe, weights

from groundup.adapt.open import open_tokenizer
from groundup.config import build_recipe
from groundup.dist import World
from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from groundup.train.distill import Distill, TaughtBatch, same_tokens
from groundup.train.experience import RolloutBatch
from groundup.train.matching import pair_layers, queries_and_keys
from groundup.train.stage import Place
from groundup.train.start import Start

Run = Callable[..., dict[str, Any]]

GKD = {"lmbda": 0.5, "divergence": "jsd", "alpha": 0.0}
RL = {"prompts": 6, "max_tokens": 8}
WAYS: dict[str, dict[str, Any]] = {
    "forward": {"distill": {"temperature": 2.0, "alpha": 0.1}},
    "reverse": {"distill": {"divergence": "reverse_kl", "alpha": 0.0}},
    "inside": {"distill": {"hidden_weight": 1.0, "attention_weight": 0.5, "alpha": 0.1}},
    "layers": {"distill": {"hidden_weight": 1.0, "layers": [-1], "divergence": "jsd", "alpha": 0.1}},
    "top-k": {"distill": {"top_k": 5, "temperature": 1.5, "alpha": 0.1}},
    "gkd": {"distill": GKD, "rl": RL},
    "on-policy": {"distill": {**GKD, "lmbda": 1.0}, "rl": RL},
    "text": {"distill": {"data": "text", "alpha": 0.1}},
}


@pytest.fixture(scope="module")
def taught(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ground` with teacher/: wider and deeper than model/, of other heads, a padded head, and opinions of its own."""
    root = tmp_path_factory.mktemp("taught")
    shutil.copytree(ground, root, dirs_exist_ok=True)
    tokenizer = load_tokenizer(root / "tok")
    config = ModelConfig(tokenizer.vocab_size + 19, 48, 96, 3, 3, 1, 32, max_position_embeddings=128)
    teacher = Transformer(config)
    teacher.init_weights(5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if "embed" in name else 0.1))
    save_model(teacher, root / "teacher")
    tokenizer.save(root / "teacher")
    return root


def recipe_of(taught: Path, root: Path, way: str = "forward", **changes: Any) -> dict[str, Any]:
    settings = {name: dict(section) for name, section in WAYS[way].items()}
    settings["distill"] = {"teacher": str(taught / "teacher"), **settings["distill"]}
    data = "text.jsonl" if settings["distill"].get("data") == "text" else "chat.jsonl"
    common = {"stage": "distill", "data": str(taught / data), "train.seq_len": 64, "cache": str(root / "cache")}
    return small_recipe(taught, root, **{**common, **settings, **changes})


def stage_of(recipe: dict[str, Any]) -> Distill:
    parsed, tokenizer = build_recipe(recipe), load_tokenizer(recipe["model"])
    data = Distill.open(parsed, tokenizer, Path(recipe["cache"]))
    return Distill(data, parsed, Place(torch.device("cpu"), World()), tokenizer)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_comes_nearer_to_the_teacher(way: str, taught: Path, tmp_path: Path, run: Run) -> None:
    before = {name: (taught / name / "model.safetensors").read_bytes() for name in ("model", "teacher")}
    changes = {"train.steps": 16, "optim.lr": 1e-2, "train.eval_every": 2, "log.every": 1}
    result = run(recipe_of(taught, tmp_path, way, **changes))
    lines = figures(result["output"])
    held = [line for line in lines if "val_divergence" in line]
    assert held[-1]["val_divergence"] < 0.98 * held[0]["val_divergence"]
    inside = [name for name in ("hidden", "attention") if WAYS[way]["distill"].get(f"{name}_weight")]
    for name in inside:
        assert held[-1][f"val_{name}"] < held[0][f"val_{name}"]
    assert {"cross_entropy", "divergence", *inside} <= lines[0].keys()
    assert ("completion_length" in lines[-2]) == (way in ("gkd", "on-policy"))
    saved, begun = weights(result["output"]), load_file(taught / "model" / "model.safetensors")
    assert saved.keys() == begun.keys()  # a stock folder: no projection is left in it
    assert load_model(result["output"]).config == load_model(taught / "model").config
    assert before == {name: (taught / name / "model.safetensors").read_bytes() for name in before}


@pytest.mark.parametrize("way", ["forward", "reverse", "layers"])
def test_the_first_loss_is_what_torch_says_of_all_logits(way: str, taught: Path, tmp_path: Path, run: Run) -> None:
    recipe = recipe_of(taught, tmp_path, way, **{"train.steps": 1, "log.every": 1})
    stage = stage_of(recipe)
    (batch,) = stage.fetch(0, 1)
    student, teacher = load_model(taught / "model"), load_model(taught / "teacher")
    given = batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT
    kept, vocab = batch.labels_BT != -100, student.config.vocab_size
    s, t = student(*given)[kept], teacher(*given)[kept][:, :vocab]
    assert teacher.config.vocab_size > vocab
    nats = F.cross_entropy(s, batch.labels_BT[kept])
    tau = stage.settings.temperature
    log_s, log_t = (s / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    mixed = (0.5 * log_s.exp() + 0.5 * log_t.exp()).log()
    far = {
        "forward": log_t.exp() * (log_t - log_s), "reverse": log_s.exp() * (log_s - log_t),
        "layers": 0.5 * log_t.exp() * (log_t - mixed) + 0.5 * log_s.exp() * (log_s - mixed),
    }[way].sum(-1).mean()  # fmt: skip
    line = figures(run(recipe)["output"])[0]
    assert line["cross_entropy"] == pytest.approx(nats.item(), rel=1e-4)
    assert line["divergence"] == pytest.approx(far.item(), rel=1e-4)
    alpha, square = stage.settings.alpha, 1.0 if way == "layers" else tau**2
    expected = alpha * nats + (1 - alpha) * square * far
    assert line["loss"] - line.get("hidden", 0.0) == pytest.approx(expected.item(), rel=1e-4)


def test_what_layers_compare_is_what_they_compute(taught: Path) -> None:
    """Queries and keys made anew from what went into a layer give its attention; seen states end in the last norm."""
    model = load_model(taught / "teacher")
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9).expand(2, -1)
    seen: list[torch.Tensor] = []
    hidden = model.hidden(ids, places, torch.zeros_like(places, dtype=torch.int32), seen=seen)
    assert len(seen) == 4
    torch.testing.assert_close(model.model.norm(seen[-1]), hidden)
    q, k = queries_and_keys(model, 1, seen[1], places)
    layer = model.blocks[1].self_attn
    v = layer.v_proj(model.blocks[1].input_layernorm(seen[1])).unflatten(-1, (-1, 32))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    after = seen[1] + layer.o_proj(out.flatten(2))
    expected = after + model.blocks[1].mlp(model.blocks[1].post_attention_layernorm(after))
    torch.testing.assert_close(seen[2], expected, atol=1e-4, rtol=1e-4)


def test_layers_are_paired_by_their_share_of_the_way_up() -> None:
    assert pair_layers([], 2, 6) == [(0, 2), (1, 5)]
    assert pair_layers([], 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert pair_layers([-1], 4, 2) == [(3, 1)]
    assert [j for _, j in pair_layers([], 4, 2)] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="no layer 4"):
        pair_layers([4], 4, 4)


@pytest.mark.parametrize("way", ["inside", "top-k", "gkd"])
def test_however_a_step_is_cut_it_is_the_same(way: str, taught: Path, tmp_path: Path, run: Run) -> None:
    outputs = []
    for name, size, times in (("whole", 8, 1), ("parts", 1, 8)):
        cut = {"train.batch_size": size, "train.accumulate": times, "output": name, "train.eval_rows": 4}
        outputs.append(run(recipe_of(taught, tmp_path, way, **cut, **{"log.every": 1}))["output"])
    assert furthest(*map(weights, outputs)) < 2e-5
    assert furthest(weights(outputs[0]), load_file(taught / "model" / "model.safetensors")) > 1e-3
    for a, b in zip(*map(figures, outputs), strict=True):
        for name in a.keys() - {"lr"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


RANK = """
import json, sys
import torch
from groundup.train.run import train

torch.set_num_threads(1)
for recipe in json.loads(sys.argv[1]):
    train(recipe, peak=1e9)
"""


def test_two_ranks_are_one_process(taught: Path, tmp_path: Path, run: Run) -> None:
    """GKD with projections; and top-k, whose teacher is asked by two processes, too."""
    ways = {
        "gkd": {**GKD, "hidden_weight": 0.5, "attention_weight": 0.5, "teacher": str(taught / "teacher")},
        "top-k": {"top_k": 5, "teacher": str(taught / "teacher")},
    }

    def made(ranks: int) -> list[dict[str, Any]]:
        changes = {"train.batch_size": 4 // ranks, "cache": str(tmp_path / f"cache {ranks}"), "train.eval_every": 6}
        return [
            recipe_of(taught, tmp_path, way, output=f"{way} {ranks}", distill=distill, **changes)
            for way, distill in ways.items()
        ]

    alone, pairs = [run(recipe)["output"] for recipe in made(1)], made(2)
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
               f"--master-port={port}", str(tmp_path / "rank.py"), json.dumps(pairs)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for one, two in zip(alone, pairs, strict=True):
        assert furthest(weights(one), weights(two["output"])) < 2e-5
        for a, b in zip(figures(one), figures(two["output"]), strict=True):
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), name


LIVES = """
base = recipe

def killed(name, changes, lives, seed):
    global recipe
    recipe = {**base, **changes, "cache": root + "/cache of " + name}
    dice, ends = random.Random(seed), []
    assert life(root + "/whole " + name, lambda: count_calls(-1)) == 0
    calls = int(pathlib.Path(root + "/whole " + name + ".calls").read_text())
    recipe["cache"] += " that was killed"
    for _ in range(lives):
        limit = dice.randrange(calls // 20, calls // 2)
        ends.append(life(root + "/killed " + name, lambda: count_calls(limit)))
    assert life(root + "/killed " + name, lambda: None) == 0
    return ends

print(json.dumps([killed(name, changes, 6, 3) for name, changes in json.loads(sys.argv[3]).items()]))
"""


def test_killed_and_resumed_it_ends_in_the_same_bytes(taught: Path, tmp_path: Path) -> None:
    """GKD with projections, killed while it samples and steps; and top-k, killed while the teacher is asked, too."""
    settings = recipe_of(taught, tmp_path, **{"train.steps": 5, "log.every": 1})
    teacher = {"teacher": str(taught / "teacher")}
    ways = {
        "gkd": {"distill": {**teacher, **GKD, "hidden_weight": 0.5}, "rl": RL},
        "top-k": {"distill": {**teacher, "top_k": 4}},
    }
    done = subprocess.run(
        [sys.executable, "-c", NURSERY + LIVES, json.dumps(settings), str(tmp_path), json.dumps(ways)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(ends.count(9) >= 3 for ends in json.loads(done.stdout.splitlines()[-1]))
    for name in ways:
        alone, killed = tmp_path / f"whole {name}", tmp_path / f"killed {name}"
        last = sorted(p.name for p in (alone / "checkpoints").iterdir())[-1]
        files = [f"checkpoints/{last}/{part}.safetensors" for part in ("model", "optimizer", "rng")]
        for file in ("model.safetensors", *files):
            assert (alone / file).read_bytes() == (killed / file).read_bytes(), file
        assert figures(alone) == figures(killed)
        kept = [sorted((tmp_path / f"cache of {name}{end}").glob("topk-*/*.bin")) for end in ("", " that was killed")]
        assert [p.read_bytes() for p in kept[0]] == [p.read_bytes() for p in kept[1]]
        assert len(kept[0]) == (8 if name == "top-k" else 0)


def test_own_answers_are_as_many_steps_as_asked_for_and_as_the_student_then_speaks(
    taught: Path, tmp_path: Path
) -> None:
    settings = {**GKD, "alpha": 0.2, "teacher": str(taught / "teacher")}
    recipe = recipe_of(taught, tmp_path, "gkd", distill=settings)
    stage, again = stage_of(recipe), stage_of(recipe)
    own = [stage.own(step) for step in range(400)]
    assert 160 < sum(own) < 240 and own == [again.own(step) for step in range(400)]
    model = load_model(taught / "model")
    stage.prepare(Start(model))
    first, later = own.index(True), own.index(True, own.index(True) + 1)
    texts = {}
    for step in (first, later, first):
        batches = stage.fetch(step, 1)
        assert all(isinstance(batch, RolloutBatch) for batch in batches)
        said = torch.cat([batch.labels_BT[batch.labels_BT != -100] for batch in batches])
        assert stage.figures()["completion_length"] == pytest.approx(len(said) / 6)
        if step in texts:
            assert torch.equal(texts[step], said)
        texts[step] = said
    assert not torch.equal(texts[first], texts[later][: len(texts[first])])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    moved = torch.cat([batch.labels_BT[batch.labels_BT != -100] for batch in stage.fetch(first, 1)])
    assert not torch.equal(moved, texts[first])  # sampled from the weights as they are now
    loss, _, metrics = stage.loss(model, stage.fetch(first, 1)[0])
    assert loss.item() == pytest.approx(0.8 * metrics["divergence"].item(), rel=1e-5)  # no cross entropy of its own


def test_what_the_teacher_said_is_kept_and_found_again(
    taught: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def asked(**changes: Any) -> bool:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(recipe_of(taught, tmp_path, "top-k", **{"train.steps": 1, **changes}))
        return "asking the teacher" in caplog.text

    again = {"distill": {"teacher": str(taught / "teacher"), "top_k": 5, "temperature": 1.5, "alpha": 0.9}}
    assert asked()
    assert not asked(
        output="b", **again, **{"train.batch_size": 2, "optim.lr": 1e-4}
    )  # these do not change its answers
    other = tmp_path / "teacher"
    shutil.copytree(taught / "teacher", other)
    assert not asked(output="c", distill={**again["distill"], "teacher": str(other)})  # nor does where it lies
    assert asked(output="d", distill={**again["distill"], "top_k": 6})
    assert asked(output="e", distill={**again["distill"], "temperature": 1.0})
    assert asked(output="f", **{"train.seq_len": 40})
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.1 for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    assert asked(output="g", distill={**again["distill"], "teacher": str(other)})


def test_the_whole_vocabulary_kept_is_the_teacher_beside(taught: Path, tmp_path: Path, run: Run) -> None:
    vocab = load_model(taught / "model").config.vocab_size
    lines = []
    for name, k in (("beside", 0), ("kept", vocab)):
        settings = {"teacher": str(taught / "teacher"), "temperature": 1.5, "top_k": k}
        recipe = recipe_of(taught, tmp_path, output=name, distill=settings, **{"log.every": 1})
        lines.append(figures(run(recipe)["output"]))
    for a, b in zip(*lines, strict=True):
        for name in a.keys() - {"lr", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], rel=3e-3), name  # logprobs are kept in 16 bits
    with pytest.raises(UserError, match="more than the vocabulary"):
        run(recipe_of(taught, tmp_path, output="c", distill={"teacher": str(taught / "teacher"), "top_k": vocab + 1}))


def test_kept_answers_travel_with_their_rows(taught: Path, tmp_path: Path) -> None:
    stage = stage_of(recipe_of(taught, tmp_path, "top-k"))
    stage.prepare(Start(load_model(taught / "model")))
    teacher = load_model(taught / "teacher")
    (batch,) = stage.fetch(3, 1)
    assert isinstance(batch, TaughtBatch)
    logits = teacher(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
    vocab = load_model(taught / "model").config.vocab_size
    best = (logits[batch.labels_BT != -100][:, :vocab] / 1.5).log_softmax(-1).topk(5)
    assert torch.equal(batch.ids_MK.long(), best.indices)
    torch.testing.assert_close(batch.logprobs_MK.float(), best.values, atol=4e-3, rtol=1e-3)


def test_a_preset_begins_with_its_teacher_s_tokenizer(taught: Path, tmp_path: Path, run: Run) -> None:
    result = run(recipe_of(taught, tmp_path, model="depth-1-width-32", **{"train.steps": 1}))
    config = load_model(result["output"]).config
    assert (config.hidden_size, config.num_hidden_layers) == (32, 1)
    assert open_tokenizer(result["output"]).fingerprint() == load_tokenizer(taught / "tok").fingerprint()


def test_a_part_of_the_student_may_learn(taught: Path, tmp_path: Path, run: Run) -> None:
    """LoRA, with projections beside it: rates of single parameters still find them, PEFT's files alone are saved."""
    changes = {"adapt": {"method": "lora", "rank": 2, "lr_ratio": 4}, "train.steps": 12, "optim.lr": 1e-2}
    result = run(recipe_of(taught, tmp_path, "inside", **changes))
    held = [line["val_divergence"] for line in figures(result["output"]) if "val_divergence" in line]
    assert held[-1] < held[0]
    saved = load_file(Path(result["output"]) / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_a_teacher_may_be_computed_by_transformers(kind: str, taught: Path, tmp_path: Path, run: Run) -> None:
    tokenizer = load_tokenizer(taught / "tok")
    make_stock(kind, vocab_size=tokenizer.vocab_size + 3).save_pretrained(tmp_path / "foreign")
    tokenizer.save(tmp_path / "foreign")
    settings = {"teacher": str(tmp_path / "foreign"), "hidden_weight": 1.0, "alpha": 0.0}
    changes = {"train.steps": 16, "optim.lr": 1e-2, "train.eval_every": 2}
    lines = figures(run(recipe_of(taught, tmp_path, distill=settings, **changes))["output"])
    held = [line for line in lines if "val_divergence" in line]
    assert held[-1]["val_divergence"] < held[0]["val_divergence"] and held[-1]["val_hidden"] < held[0]["val_hidden"]
    with pytest.raises(UserError, match="does not show its attention"):
        run(recipe_of(taught, tmp_path, output="b", distill={**settings, "attention_weight": 1.0}))


def test_another_tokenizer_is_refused_with_the_difference(taught: Path, tmp_path: Path, run: Run) -> None:
    other = train_tokenizer(["a quick brown fox jumps over the lazy dog"] * 9, 300)
    shutil.copytree(taught / "teacher", tmp_path / "teacher")
    other.save(tmp_path / "teacher")
    with pytest.raises(
        UserError, match=r"another tokenizer: \d+ of the student's \d+ tokens differ, the first is '"
    ) as error:
        run(recipe_of(taught, tmp_path, distill={"teacher": str(tmp_path / "teacher")}))
    assert "groundup distill ask" in str(error.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_more_tokens_and_another_template_do_no_harm_fewer_do(taught: Path) -> None:
    ours = load_tokenizer(taught / "tok")

    def made(change: Callable[[dict[str, Any]], None], template: str = "") -> Tokenizer:
        spec = json.loads(ours.backend.to_str())
        change(spec)
        return Tokenizer(Backend.from_str(json.dumps(spec)), ours.config, ours.chat_template + template)

    def one_more(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"]["xyzzy"] = ours.vocab_size

    def unmerged(spec: dict[str, Any]) -> None:
        spec["model"]["merges"] = spec["model"]["merges"][:2]

    same_tokens(ours, made(one_more, template="{# #}"), "teacher")
    differs = f"1 of the student's {ours.vocab_size + 1} tokens differ, the first is 'xyzzy', {ours.vocab_size} for the"
    with pytest.raises(UserError, match=f"{differs} student and none for the teacher"):
        same_tokens(made(one_more), ours, "teacher")
    with pytest.raises(UserError, match="other merges"):
        same_tokens(ours, made(unmerged), "teacher")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": {}}, "distill.teacher: is missing"),
        ({"distill": {"teacher": "nowhere"}}, "no such folder"),
        ({"distill": {"top_k": 4, "lmbda": 0.5}}, "top_k keeps no teacher at hand"),
        ({"distill": {"lmbda": 0.5, "data": "text"}}, "lmbda answers prompts"),
        ({"distill": {"hidden_weight": 1.0, "layers": [7]}}, "the student has no layer 7"),
        ({"distill": {"lmbda": 0.5}, "rl": {"rewards": ["exact"], "max_tokens": 8}}, "rl.rewards"),
        ({"rl": {"max_tokens": 8}}, "nothing is sampled while distill.lmbda is 0"),
        ({"distill": {"attention_weight": 1.0}, "adapt": {"method": "prompt"}}, "soft prompt"),
        ({"train.seq_len": 200, "model": "depth-1"}, "exceeds the teacher's 128 positions"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    changes: dict[str, Any], said: str, taught: Path, tmp_path: Path, run: Run
) -> None:
    values = recipe_of(taught, tmp_path, **{key: value for key, value in changes.items() if key != "distill"})
    values["distill"] = {"teacher": values["distill"]["teacher"], **changes.get("distill", {})}
    if changes.get("distill") == {}:
        del values["distill"]["teacher"]
    with pytest.raises(UserError, match=said) as error:
        run(values)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_teacher_that_changed_is_refused_when_a_run_goes_on(taught: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(taught / "teacher", tmp_path / "teacher")
    recipe = recipe_of(taught, tmp_path, distill={"teacher": str(tmp_path / "teacher")})
    run(recipe)
    (tmp_path / "run" / "done.json").unlink()
    file = tmp_path / "teacher" / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights have changed since"):
        run(recipe)


def test_no_logits_of_a_whole_batch_are_ever_alive(taught: Path, tmp_path: Path) -> None:
    """Neither the student's nor the teacher's, forwards and backwards."""
    from torch.utils._python_dispatch import TorchDispatchMode

    stage = stage_of(recipe_of(taught, tmp_path, "text", **{"train.batch_size": 16}))
    student = load_model(taught / "model")
    stage.prepare(Start(student))
    (batch,) = stage.fetch(0, 1)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
            largest[0] = max([largest[0], *(x.numel() for x in tensors)])
            return out

    with Watch():
        stage.loss(student, batch)[0].backward()
    tokens, vocab = int((batch.labels_BT != -100).sum()), student.config.vocab_size
    assert tokens > 900 and largest[0] < 0.65 * tokens * vocab
