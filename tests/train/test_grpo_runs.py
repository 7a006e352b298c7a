"""GRPO and its relatives, from prompts to a model folder: they learn, resume to the same bytes, say what is wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_helpers import rl_recipe, write_ground
from safetensors.torch import load_file
from test_resume import NURSERY
from train_helpers import furthest, weights

from groundup.config import build_recipe
from groundup.dist import World
from groundup.errors import UserError
from groundup.infer.params import Completion, TokenLogprob
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer
from groundup.train.grpo import GRPO, over_all
from groundup.train.health import check
from groundup.train.reference import token_logps
from groundup.train.stage import Place
from groundup.train.start import Start

Run = Callable[..., dict[str, Any]]
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++")
CLOCK = ("tokens_per_second", "share_of_peak", "rollout_seconds")


@pytest.fixture(scope="module")
def root(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ground(tmp_path_factory.mktemp("rl"), ground)


def lines(output: str | Path) -> list[dict[str, Any]]:
    text = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in text.splitlines()]


def trained(output: str | Path) -> list[dict[str, Any]]:
    return [line for line in lines(output) if "loss" in line]


def stage_of(values: dict[str, Any]) -> tuple[GRPO, Any]:
    """The stage of a recipe, ready to fetch, and its model."""
    recipe = build_recipe(values)
    tokenizer = load_tokenizer(recipe.model)
    stage = GRPO(GRPO.open(recipe, tokenizer, Path()), recipe, Place(torch.device("cpu"), World()), tokenizer)
    model = stage.prepare(Start(load_model(recipe.model, dtype=torch.float32)))
    return stage, model


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_makes_answers_worth_more(loss: str, root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.loss": loss, "rl.minibatches": 1, "rl.prompts": 8, "train.steps": 6, "optim.lr": 2e-2}
    result = run(rl_recipe(root, tmp_path, **keys, **{"train.save_every": 6, "train.eval_every": 6}))
    rewards = [line["reward"] for line in trained(result["output"])]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1, rewards
    for line in trained(result["output"]):
        assert all(math.isfinite(value) for value in line.values())
        assert line["probability_difference"] < 1e-4
        assert line["ratio_min"] == pytest.approx(1, abs=1e-6) == pytest.approx(line["ratio_max"], abs=1e-6)


def test_a_lora_policy_is_held_to_its_base_and_learns(root: Path, tmp_path: Path, run: Run) -> None:
    keys: dict[str, Any] = {"rl.beta": 0.02, "rl.minibatches": 1, "train.steps": 9, "optim.lr": 2e-2, "rl.prompts": 8}
    keys |= {"adapt": {"method": "lora", "rank": 8, "alpha": 64}, "train.save_every": 9, "train.eval_every": 9}
    result = run(rl_recipe(root, tmp_path, **keys))
    seen = trained(result["output"])
    assert sum(line["reward"] for line in seen[-3:]) / 3 > seen[0]["reward"] + 0.1
    assert seen[0]["kl_reply"] == pytest.approx(0, abs=1e-4) and seen[-1]["kl_reply"] > 0.5
    assert (Path(result["output"]) / "adapter_model.safetensors").exists()


def test_what_a_round_tells_of_itself(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.epochs": 2, "rl.beta": 0.1, "train.steps": 8, "rl.samples": 2}
    result = run(rl_recipe(root, tmp_path, **keys))
    output = Path(result["output"])
    first, last = trained(output)[0], trained(output)[-1]
    wanted = {"reward", "reward_std", "reward/liked", "kl", "kl_reply", "entropy", "clip_fraction_low",
              "ratio_min", "ratio_max", "completion_length", "truncated", "groups_equal", "probability_difference",
              "approx_kl", "beta"}  # fmt: skip
    assert wanted <= first.keys(), wanted - first.keys()
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and last["ratio_max"] > 1.001
    assert result["metrics"]["reward"] == last["reward"] and "val_reward" in result["metrics"]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [s["round"] for s in samples] == [0] * 8 + [1] * 8
    assert {"prompt", "completion", "reward", "parts", "truncated", "answer", "step"} <= samples[0].keys()


def test_several_steps_on_a_round_use_its_old_probabilities(root: Path, tmp_path: Path) -> None:
    stage, model = stage_of(rl_recipe(root, tmp_path, **{"rl.epochs": 2, "rl.temperature": 0.8}))
    [batch, *_] = stage.fetch(0, 1)
    with torch.no_grad():
        now_BT = token_logps(model, batch, 0.8)
    torch.testing.assert_close(batch.old_BT, torch.where(batch.mask_BT, now_BT, 0.0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch.engine_BT, batch.old_BT, atol=1e-4, rtol=1e-3)
    again = {one.number for position in (0, 1) for one in stage._share(position)}
    assert again == {0, 1, 2, 3} and stage.updates == 4
    assert stage.round == 0 and stage.fetch(3, 1) and stage.round == 0 and stage.fetch(4, 1) and stage.round == 1


@pytest.mark.parametrize("over", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_engine_that_differs_is_accounted_for(level: str, over: str, root: Path, tmp_path: Path) -> None:
    keys = {"rl.importance_cap": 1.1, "rl.importance_level": level, "rl.importance_over": over}
    stage, model = stage_of(rl_recipe(root, tmp_path, **keys))
    batch = stage.fetch(0, 1)[0]
    noise_BT = torch.randn(batch.engine_BT.shape, generator=torch.Generator().manual_seed(1))
    batch.engine_BT = batch.engine_BT + 0.1 * noise_BT
    with torch.no_grad():
        total, _, _ = stage.loss(model, batch)
        now_BT = token_logps(model, batch, 1.0)
    expected, above = 0.0, 0
    for row, docs_T in enumerate(batch.doc_ids_BT):
        for doc in docs_T[batch.mask_BT[row]].unique():
            own_T = (docs_T == doc) & batch.mask_BT[row]
            logs_M = (now_BT - batch.engine_BT)[row, own_T]
            weights_M = (logs_M if level == "token" else logs_M.sum().expand_as(logs_M)).exp()
            above += int((weights_M > 1.1).sum())
            weights_M = torch.where(weights_M > 1.1, 1.1 if over == "truncate" else 0.0, weights_M)
            expected -= float((weights_M * batch.advantages_BT[row, own_T]).mean())
    assert above and float(total) == pytest.approx(expected, abs=1e-4)


def test_the_gradient_is_that_of_the_plain_formula(root: Path, tmp_path: Path) -> None:
    """Packed rows, micro-batches and the chunked head against each answer by itself with all its logits."""
    values = rl_recipe(root, tmp_path, **{"rl.minibatches": 1, "rl.temperature": 0.8, "train.batch_size": 1})
    stage, model = stage_of(values)
    batches = stage.fetch(0, 1)
    count = sum(stage.count(batch)[0] for batch in batches)
    assert len(batches) > 1 and count == 16
    for batch in batches:
        total, _, _ = stage.loss(model, batch)
        (total / count).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rewards = torch.tensor([one.reward for one in stage.experiences]).view(4, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    plain = torch.zeros(())
    for one, advantage in zip(stage.experiences, advantages, strict=True):
        logits_TV = model(torch.tensor([one.ids]))[0, one.start - 1 : -1] / 0.8
        logprobs_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(one.ids[one.start :])[:, None])
        plain = plain - advantage * logprobs_T.mean() / 16
    plain.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=2e-6, rtol=2e-4)


def test_rows_in_a_pass_do_not_matter(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.epochs": 2, "rl.beta": 0.1, "optim.lr": 1e-3}
    one = run(rl_recipe(root, tmp_path, output="one", **keys, **{"train.batch_size": 1}))
    many = run(rl_recipe(root, tmp_path, output="many", **keys, **{"train.batch_size": 8, "train.seq_len": 128}))
    assert furthest(weights(one["output"]), weights(many["output"])) < 2e-5


LIVES = """
dice, ends = random.Random(7), []
for _ in range(5):
    limit = dice.randrange(total // 20, total // 2)
    ends.append(life(root + "/killed", lambda: count_calls(limit)))
for place, nth, after in [("Loop.step", 1, True), ("checkpoint.save_file", 4, True), ("Loop.save", 1, True)]:
    ends.append(life(root + "/chosen", lambda: kill_at(place, nth, after, signal.SIGKILL)))
assert life(root + "/killed", lambda: None) == 0 and life(root + "/chosen", lambda: None) == 0
print(json.dumps(ends))
"""


def lives(settings: dict[str, Any], root: Path) -> list[int]:
    """One run left alone, and two that were killed many times in the middle of their rounds."""
    done = subprocess.run(
        [sys.executable, "-c", NURSERY + LIVES, json.dumps(settings), str(root)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_bytes(root: Path) -> None:
    alone = root / "alone"
    last = sorted(p.name for p in (alone / "checkpoints").iterdir())[-1]
    for killed in (root / "killed", root / "chosen"):
        inside = [f"checkpoints/{last}/{part}.safetensors" for part in ("model", "optimizer", "stage")]
        for file in ("model.safetensors", *inside):
            assert (alone / file).read_bytes() == (killed / file).read_bytes(), file
        assert lines(alone) == lines(killed)
        assert (alone / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes()


def test_killed_in_the_middle_of_a_round_it_ends_in_the_same_bytes(root: Path, tmp_path: Path) -> None:
    keys = {"rl.epochs": 2, "train.steps": 7, "rl.beta": 0.1, "rl.kl_target": 0.5, "rl.reward_norm": True,
            "train.ema": 0.9, "rl.dynamic_sampling": 1, "rl.importance_cap": 2.0, "rl.rewards": ["length"]}  # fmt: skip
    keys["rl.rewards"] = [{"name": "length", "args": {"low": 3, "high": 7, "soft": 3}}]
    ends = lives(rl_recipe(root, tmp_path, **keys), tmp_path)
    assert ends.count(9) >= 5, ends
    same_bytes(tmp_path)


def test_a_policy_with_tools_is_offered_them_and_learns_its_own_words_alone(root: Path, tmp_path: Path) -> None:
    keys = {"rl.tools": "calculator", "train.seq_len": 1024, "rl.max_tokens": 400, "rl.prompts": 1, "rl.turns": 2}
    keys |= {"rl.minibatches": 1, "rl.group_size": 2}
    stage, _ = stage_of(rl_recipe(root, tmp_path, **keys))
    call = stage.tokenizer.encode(
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
    )
    end = stage.tokenizer.plain.control["<|im_end|>"]
    spoken = iter(
        [[*call, end], [40, 41, end], [42, end]]
    )  # one answer calls, hears and goes on; the other does not call

    def ask(asked: Any) -> list[Completion]:
        count = sum(params.n for _, params in asked)
        said = [next(spoken) for _ in range(count)]
        return [
            Completion(
                asked[0][0], ids, stage.tokenizer.decode(ids[:-1]), "stop", [TokenLogprob(i, -1.0) for i in ids], n
            )
            for n, ids in enumerate(said)
        ]

    stage.sampler._ask = ask  # type: ignore[method-assign]
    batches = stage.fetch(0, 1)
    first, second = sorted(stage.experiences, key=lambda one: -one.length)
    shown = stage.tokenizer.decode(first.ids)
    assert '"name": "calculator"' in stage.tokenizer.decode(first.ids[: first.start]), "the prompt offers the tool"
    assert "<tool_response>\n42\n</tool_response>" in shown and second.length == 3
    labels = sum(int((batch.labels_BT != -100).sum()) for batch in batches)
    assert labels == len(call) + 1 + 2 + 3, "what the tool said is not learnt"


def test_groups_of_equal_rewards_give_way_to_other_prompts(root: Path, tmp_path: Path) -> None:
    """DAPO's dynamic sampling, and how a round's prompts follow from its number alone."""
    rewards = root / "odd.py"
    rewards.write_text(
        "def odd(prompts, completions, **columns):\n"
        "    return [float(len(t) % 2) if int(a) % 2 else 0.0 for t, a in zip(completions, columns['answer'])]\n"
    )
    keys = {"rl.prompts": 8, "rl.rewards": [f"{rewards}:odd"], "rl.loss": "dapo"}
    plain, _ = stage_of(rl_recipe(root, tmp_path, **keys))
    plain.fetch(0, 1)
    dynamic, _ = stage_of(rl_recipe(root, tmp_path, **keys, **{"rl.dynamic_sampling": 4}))
    dynamic.fetch(0, 1)
    groups = [[e.reward for e in s.experiences if e.number == n] for s in (plain, dynamic) for n in range(8)]
    equal = [not any(rewards) for rewards in groups]
    assert sum(equal[:8]) >= 2 > sum(equal[8:])
    assert len(plain.experiences) == len(dynamic.experiences) == 32
    kept = [n for n in range(8) if not equal[n]]
    for n in kept:  # what could be learnt from stays as it was
        a, b = ([e.ids for e in stage.experiences if e.number == n] for stage in (plain, dynamic))
        assert a == b
    assert plain.told[0]["groups_equal"] == dynamic.told[0]["groups_equal"] == sum(equal[:8]) / 8


def test_answers_that_nobody_judged_are_left_out_and_counted(
    root: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(rl_recipe(root, tmp_path, **{"rl.rewards": [f"{root / 'rewards.py'}:some"]}))
    assert 0 < trained(result["output"])[0]["unjudged"] < 1
    assert sum("have no reward" in record.message for record in caplog.records) == 1
    stage, _ = stage_of(rl_recipe(root, tmp_path, **{"rl.rewards": [f"{root / 'rewards.py'}:some"]}))
    batches = stage.fetch(0, 1)
    assert all(float(one.columns["mask"].sum()) == 0 for one in stage.experiences if math.isnan(one.reward))
    judged = [one for one in stage._share(0) if not math.isnan(one.reward)]
    assert sum(stage.count(batch)[0] for batch in batches) == len(judged)


def test_rewards_that_are_always_equal_are_said_and_teach_nothing(
    root: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(rl_recipe(root, tmp_path, **{"rl.rewards": [f"{root / 'rewards.py'}:same"]}))
    assert sum("nothing to learn" in record.message for record in caplog.records) == 1
    assert furthest(weights(root / "policy"), weights(result["output"])) == 0


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("none", "no answer of its rollout has a reward"),
        ("short", "returned 15 values for 16 completions"),
        ("nan", "returned nan"),
        ("raising", "division by zero"),
        ("hanging", "no answer within 1 seconds"),
        ("absent", "absent"),
    ],
)
def test_a_broken_reward_is_named(function: str, said: str, root: Path, tmp_path: Path, run: Run) -> None:
    name = f"{root / 'rewards.py'}:{function}"
    with pytest.raises(UserError) as error:
        run(rl_recipe(root, tmp_path, **{"rl.rewards": [name], "rl.reward_seconds": 1.0}))
    assert said in str(error.value) and (function in str(error.value) or function == "none")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rl.group_size": 1}, "a single answer has no others"),
        ({"rl.rewards": []}, "rl.rewards: is empty"),
        ({"rl.top_p": 0.9}, "rl.top_p: answers drawn from a part of the distribution"),
        ({"rl.minibatches": 3}, "4 prompts make no 3 equal parts"),
        ({"rl.lam": 0.9}, "rl.lam: stage grpo does not read it"),
        ({"rl.kl_target": 1.0}, "no beta to steer"),
        ({"rl.importance_over": "mask"}, "rl.importance_over: there are no weights without a cap"),
        ({"adapt": {"method": "lora", "dropout": 0.1}}, "adapt.dropout"),
        ({"rl.max_tokens": 64}, "train.seq_len"),
        ({"rl.max_tokens": 40}, "prompts are too long, the first is here"),
        ({"rl.rewards": ["number", "exakt"]}, "exact"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], said: str, root: Path, tmp_path: Path, run: Run
) -> None:
    with pytest.raises(UserError) as error:
        run(rl_recipe(root, tmp_path, **changes))
    assert said in str(error.value)


def test_few_prompts_that_are_too_long_are_left_out_and_counted(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the cat", "answer": "1", "letter": "a"}] * 150 + [{"prompt": "red dog " * 60, "answer": "2"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = rl_recipe(root, tmp_path, data=str(tmp_path / "long.jsonl"))
    recipe = build_recipe(values)
    with caplog.at_level(logging.WARNING):
        found = GRPO.open(recipe, load_tokenizer(recipe.model), Path())
    assert len(found.train) + len(found.val) == 150
    assert "1 prompts left out" in caplog.text and "long.jsonl:151" in caplog.text


def test_a_policy_that_collapses_stops_and_the_last_checkpoint_is_kept(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.entropy_bounds": [4.0, 6.0], "train.steps": 60, "optim.lr": 0.05, "rl.minibatches": 1}
    values = rl_recipe(root, tmp_path, **keys)
    said = r"the policy has collapsed: its entropy is .* outside of rl.entropy_bounds"
    with pytest.raises(UserError, match=said) as error:
        run(values)
    kept = sorted(int(p.name[5:]) for p in (Path(values["output"]) / "checkpoints").iterdir())
    step = int(str(error.value).split("step ")[1].split(":")[0])
    assert kept and kept[-1] == step - 1, "what the collapsed policy was is not saved"
    assert load_file(Path(values["output"]) / f"checkpoints/step-{kept[-1]}/model.safetensors")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"completion_length": 1.0}, "its answers are 1 tokens long, outside of rl.length_bounds=\\[2, 9\\]"),
        ({"completion_length": 10.0}, "its answers are 10 tokens long"),
        ({"sampled_entropy": float("nan")}, "its entropy is nan"),
        ({"unjudged": 1.0}, "no answer of its rollout has a reward"),
    ],
)
def test_what_counts_as_a_collapse(figures: dict[str, float], said: str, root: Path, tmp_path: Path) -> None:
    recipe = build_recipe(rl_recipe(root, tmp_path, **{"rl.length_bounds": [2, 9]}))
    sound = {"completion_length": 5.0, "sampled_entropy": 1.0, "unjudged": 0.0}
    check(sound, recipe.rl, 3, recipe)
    with pytest.raises(UserError, match=said):
        check(sound | figures, recipe.rl, 3, recipe)


def test_bounds_that_no_policy_meets_are_said_at_once(root: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match="from the start"):
        run(rl_recipe(root, tmp_path, **{"rl.length_bounds": [50, 60]}))


def test_truncated_answers_may_be_left_out_and_cost(root: Path, tmp_path: Path) -> None:
    keys = {"rl.mask_truncated_completions": True, "rl.missing_eos_penalty": 2.0, "rl.overlong_buffer": 4}
    stage, _ = stage_of(rl_recipe(root, tmp_path, **keys))
    stage.fetch(0, 1)
    cut = [one for one in stage.experiences if one.truncated]
    assert cut and all(float(one.columns["mask"].sum()) == 0 and one.reward < -2 for one in cut)
    assert stage.told[0]["truncated"] == len(cut) / 16
    if len(cut) == 16:
        assert stage.counts == [0, 0]


def test_a_round_of_which_nothing_is_trained_is_a_step_of_nothing(root: Path, tmp_path: Path, run: Run) -> None:
    keys = {"rl.mask_truncated_completions": True, "rl.max_tokens": 1, "train.steps": 2, "rl.loss": "dapo"}
    result = run(rl_recipe(root, tmp_path, **keys))
    assert furthest(weights(root / "policy"), weights(result["output"])) == 0


def test_a_policy_far_from_where_it_was_sampled_leaves_the_round(root: Path, tmp_path: Path) -> None:
    stage, model = stage_of(rl_recipe(root, tmp_path, **{"rl.epochs": 4, "rl.kl_stop": 0.01}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    begun = []
    for step in range(8):
        if step == 4:
            optimizer.param_groups[0]["lr"] = 0.02
        for batch in stage.fetch(step, 1):
            stage.loss(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        begun.append(stage.begun_at)
    assert begun[:5] == [0] * 5 and begun[-1] > 4, "the first round is left once the step is too large"


def test_batch_statistics_are_those_of_all_ranks() -> None:
    class Two(World):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value, [(1, 3.0), (1, 5.0)]]

    rewards = over_all(lambda r, n: r - r.mean() + 100 * n, torch.tensor([1.0, 2.0]), torch.tensor([2, 0]), Two(0, 2))
    assert rewards.tolist() == [200 + 1 - 2.75, 2 - 2.75]
