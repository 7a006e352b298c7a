"""PPO, from prompts to a model folder with its value model beside: it learns, resumes to the same bytes, and tells."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rl_helpers import rl_recipe, write_ground
from test_grpo_runs import lives, same_bytes, trained
from train_helpers import furthest, weights

from groundup.adapt.build import adapt
from groundup.config import build_recipe
from groundup.dist import World
from groundup.errors import UserError
from groundup.infer.generate import generate
from groundup.infer.params import SamplingParams
from groundup.model.io import load_model
from groundup.model.scored import Scored, load_scorer, save_scorer
from groundup.objectives.advantages import gae
from groundup.tokenizer import load_tokenizer
from groundup.train.ppo import PPO, TextBatch, merged
from groundup.train.stage import Place
from groundup.train.start import Start

Run = Callable[..., dict[str, Any]]
BASE = {"rl.group_size": 1, "rl.prompts": 8}
FEW = {"train.save_every": 12, "train.eval_every": 12}


@pytest.fixture(scope="module")
def root(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ground(tmp_path_factory.mktemp("ppo"), ground)


def ppo_recipe(root: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return rl_recipe(root, folder, "ppo", **(BASE | changes))


def stage_of(values: dict[str, Any]) -> tuple[PPO, Any]:
    recipe = build_recipe(values)
    tokenizer = load_tokenizer(recipe.model)
    data, place = PPO.open(recipe, tokenizer, Path(values["cache"])), Place(torch.device("cpu"), World())
    stage = PPO(data, recipe, place, tokenizer)
    model = load_model(recipe.model, dtype=torch.float32)
    adapted = adapt(model, recipe.adapt, 0, tokenizer)
    return stage, stage.prepare(Start(model, adapted))


@pytest.mark.parametrize("value_model", ["copy", "shared"])
def test_it_learns_and_leaves_two_stock_folders(value_model: str, root: Path, tmp_path: Path, run: Run) -> None:
    from transformers import AutoModelForSequenceClassification

    keys = {"rl.value_model": value_model, "rl.prompts": 16, "rl.epochs": 2, "train.steps": 40, "rl.beta": 0.01}
    result = run(ppo_recipe(root, tmp_path, **keys, **FEW, **{"optim.lr": 1e-2}))
    seen = trained(result["output"])
    assert seen[-1]["reward"] > seen[0]["reward"] + 0.1
    assert seen[0]["kl_reply"] == pytest.approx(0, abs=1e-4) and seen[-1]["kl_reply"] > 0.05
    for line in seen:
        assert all(math.isfinite(value) for value in line.values())
        assert line["probability_difference"] < 1e-4
    output = Path(result["output"])
    tokenizer = load_tokenizer(output)
    model, scorer = load_model(output), load_scorer(output / "value")
    ids = tokenizer.render([{"role": "user", "content": "the cat"}], add_generation_prompt=True).ids
    assert generate(model, tokenizer, [ids], SamplingParams(max_tokens=3))[0].ids
    stock = AutoModelForSequenceClassification.from_pretrained(output / "value")
    ids_1T = torch.tensor([ids])
    theirs = stock(ids_1T).logits
    torch.testing.assert_close(scorer.scores_BT(ids_1T)[:, -1:], theirs, atol=1e-5, rtol=1e-4)
    before = load_scorer(output / "value").score.weight.norm()
    assert before > 0, "the head was trained"


def test_a_lora_policy_has_a_value_model_on_the_same_base(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"adapt": {"method": "lora", "rank": 4}, "train.steps": 4, "optim.lr": 2e-2}
    result = run(ppo_recipe(root, tmp_path, **keys))
    output = Path(result["output"])
    assert (output / "adapter_model.safetensors").exists() and load_scorer(output / "value")
    _, model = stage_of(ppo_recipe(root, tmp_path, **keys))
    own = {id(p) for p in model.policy.parameters()}
    frozen = [p for p in model.scorer.parameters() if not p.requires_grad]
    moving = [p for p in model.scorer.parameters() if p.requires_grad]
    assert frozen and all(id(p) in own for p in frozen), "the base is there twice"
    assert moving and not any(id(p) in own for p in moving)
    with torch.no_grad():
        for p in moving:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    save_scorer(merged(model.scorer), tmp_path / "merged")
    ids_1T = torch.tensor([[1, 40, 41, 42, 7]])
    loaded = load_scorer(tmp_path / "merged")
    torch.testing.assert_close(loaded.scores_BT(ids_1T), model.scorer.scores_BT(ids_1T), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["foreign", "int8", "ia3", "frozen"])
def test_any_policy_has_a_value_model_that_others_can_read(kind: str, root: Path, tmp_path: Path, run: Run) -> None:
    adapters: dict[str, dict[str, Any]] = {
        "int8": {"method": "lora", "rank": 4, "base": "int8"}, "ia3": {"method": "ia3"},
        "frozen": {"method": "freeze", "last": 1},
    }  # fmt: skip
    keys = {"train.steps": 2, "optim.lr": 2e-2, "adapt": adapters.get(kind, {})}
    if kind == "foreign":
        keys["model"] = str(gpt2(root, tmp_path))
    result = run(ppo_recipe(root, tmp_path, **keys))
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(Path(result["output"]) / "value")
    ids_1T = torch.tensor([[1, 40, 41, 42, 7]])
    ours = load_scorer(Path(result["output"]) / "value").scores_BT(ids_1T)[:, -1:]
    torch.testing.assert_close(ours, stock(ids_1T).logits, atol=1e-5, rtol=1e-4)
    assert trained(result["output"])[0]["probability_difference"] < 1e-4, "dropout, perhaps"


def gpt2(root: Path, folder: Path) -> Path:
    import transformers

    tokenizer = load_tokenizer(root / "policy")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save(folder / "gpt2")
    return folder / "gpt2"


def test_advantages_are_those_of_the_plain_formulas(root: Path, tmp_path: Path) -> None:
    """KL in the reward, a score at the last token, GAE, whitening: each answer by itself."""
    keys = {"rl.beta": 0.3, "rl.gamma": 0.95, "rl.lam": 0.8, "rl.reward_clip": 0.55, "rl.missing_eos_penalty": 0.1}
    stage, model = stage_of(ppo_recipe(root, tmp_path, **keys))
    with torch.no_grad():
        for p in model.policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    stage.fetch(0, 1)
    every, whole = [], torch.zeros(0)
    start = load_model(root / "policy", dtype=torch.float32)
    with torch.no_grad():
        for one in stage.experiences:
            ids_1T, answer = torch.tensor([one.ids]), torch.tensor(one.ids[one.start :])[:, None]
            place = slice(one.start - 1, len(one.ids) - 1)
            own_T, old_T = (m(ids_1T)[0, place].log_softmax(-1).gather(1, answer)[:, 0] for m in (model.policy, start))
            rewards_T = -0.3 * (own_T - old_T)
            rewards_T[-1] += min(max(one.reward, -0.55), 0.55)
            advantages_T, returns_T = gae(rewards_T, model.scorer.scores_BT(ids_1T)[0, place], 0.95, 0.8)
            every.append((one, returns_T, advantages_T))
            whole = torch.cat([whole, advantages_T])
    for one, returns_T, advantages_T in every:
        torch.testing.assert_close(one.columns["returns"], returns_T, atol=2e-5, rtol=1e-4)
        wanted = (advantages_T - whole.mean()) / whole.std()
        torch.testing.assert_close(one.columns["advantages"], wanted, atol=2e-4, rtol=1e-3)
    assert stage.told[0]["kl_reply"] > 0.01 and "explained_variance" in stage.told[0]


def test_a_shared_value_reads_the_normalised_hidden_state_once(root: Path, tmp_path: Path) -> None:
    stage, model = stage_of(ppo_recipe(root, tmp_path, **{"rl.value_model": "shared"}))
    [batch, *_] = stage.fetch(0, 1)
    hidden_BTD, values_BT = model.hidden_and_values(batch)
    torch.testing.assert_close(values_BT, hidden_BTD @ model.value.weight[0])
    plain = Scored(load_model(root / "policy", dtype=torch.float32))
    with torch.no_grad():
        plain.score.weight.copy_(model.value.weight)
    where = batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT
    torch.testing.assert_close(values_BT, plain.scores_BT(*where), atol=1e-5, rtol=1e-4)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in model.policy.named_parameters()] + ["value.weight"]


def test_killed_in_the_middle_of_a_round_it_ends_in_the_same_bytes(root: Path, tmp_path: Path) -> None:
    length = {"name": "length", "args": {"low": 3, "high": 7, "soft": 3}}
    keys = {"rl.epochs": 2, "train.steps": 7, "rl.kl_target": 0.5, "rl.reward_norm": True, "train.ema": 0.9,
            "rl.rewards": [length], "rl.kl_stop": 0.02, "rl.ptx_weight": 0.5, "rl.ptx_rows": 2,
            "rl.ptx_data": str(root.parent / "chat.jsonl")}  # fmt: skip
    shutil.copy(next(root.parent.glob("ground*")) / "chat.jsonl", root.parent / "chat.jsonl")
    ends = lives(ppo_recipe(root, tmp_path, **keys), tmp_path)
    assert ends.count(9) >= 5, ends
    same_bytes(tmp_path)


def test_text_mixed_in_counts_as_much_as_its_weight_says(root: Path, ground: Path, tmp_path: Path) -> None:
    keys = {"rl.ptx_data": str(ground / "chat.jsonl"), "rl.ptx_weight": 0.5, "rl.ptx_rows": 3, "train.batch_size": 1}
    stage, model = stage_of(ppo_recipe(root, tmp_path, **keys))
    batches = stage.fetch(0, 1)
    count = sum(stage.count(batch)[0] for batch in batches)
    texts = [batch for batch in batches if isinstance(batch, TextBatch)]
    assert len(texts) == 3 and len(batches) > 4
    losses = [stage.loss(model, batch) for batch in batches]
    assert len({tuple(metrics) for _, _, metrics in losses}) == 1, "the loop adds up metrics by their order"
    labels = sum(int((t.batch.labels_BT != -100).sum()) for t in texts)
    nats = 0.0
    with torch.no_grad():
        for rows in (t.batch for t in texts):
            logits_BTV = model.policy(rows.input_ids_BT, rows.position_ids_BT, rows.doc_ids_BT)
            nats += F.cross_entropy(logits_BTV.flatten(0, 1), rows.labels_BT.flatten(), reduction="sum").item()
    ptx = sum(losses[i][0].item() for i, batch in enumerate(batches) if isinstance(batch, TextBatch))
    assert ptx / count == pytest.approx(0.5 * nats / labels, rel=1e-4)
    assert sum(float(m["ptx_loss"]) for _, _, m in losses) / count == pytest.approx(nats / labels, rel=1e-4)


def test_beta_is_steered_and_the_value_has_a_rate_of_its_own(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.kl_target": 0.001, "rl.kl_horizon": 20, "rl.beta": 0.1, "train.steps": 12, "rl.epochs": 2}
    result = run(ppo_recipe(root, tmp_path, **keys, **FEW))
    betas = [line["beta"] for line in trained(result["output"])]
    assert betas[-1] > betas[4] and betas[0] == 0.1
    recipe = ppo_recipe(root, tmp_path, **{"rl.value_lr_ratio": 3.0})
    stage, model = stage_of(recipe)
    rates = stage.rates(Start(model.policy))
    assert rates["value.score.weight"] == 3.0 and not any("value" not in name for name in rates)


def test_the_value_may_begin_as_a_reward_model(root: Path, tmp_path: Path, run: Run) -> None:
    result = run(ppo_recipe(root, tmp_path, output="first", **{"train.steps": 4}))
    scorer = Path(result["output"]) / "value"
    keys = {"rl.value_model": str(scorer), "rl.rewards": [{"name": "reward_model", "args": {"path": str(scorer)}}],
            "rl.max_tokens": 4}  # fmt: skip
    second = run(ppo_recipe(root, tmp_path, output="second", **keys))
    assert trained(second["output"])[0]["reward/reward_model"] == pytest.approx(trained(second["output"])[0]["reward"])
    assert load_scorer(Path(second["output"]) / "value")
    with pytest.raises(UserError, match="no score head"):
        run(ppo_recipe(root, tmp_path, output="third", **{"rl.value_model": str(root / "policy")}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rl.loss": "dapo"}, "rl.loss: stage ppo does not read it"),
        ({"rl.ptx_weight": 1.0}, "rl.ptx_data: is missing beside rl.ptx_weight"),
        ({"adapt": {"method": "prompt", "tokens": 2}}, "value model has no soft prompt"),
        ({"rl.rewards": []}, "rl.rewards"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], said: str, root: Path, tmp_path: Path, run: Run
) -> None:
    with pytest.raises(UserError) as error:
        run(ppo_recipe(root, tmp_path, **changes))
    assert said in str(error.value)


def test_rows_in_a_pass_do_not_matter(root: Path, tmp_path: Path, run: Run) -> None:
    one = run(ppo_recipe(root, tmp_path, output="one", **{"train.batch_size": 1, "optim.lr": 1e-3}))
    many = run(ppo_recipe(root, tmp_path, output="many", **{"train.batch_size": 8, "optim.lr": 1e-3}))
    assert furthest(weights(one["output"]), weights(many["output"])) < 2e-5
    assert json.loads((Path(one["output"]) / "done.json").read_text())["metrics"]["reward"] > 0
