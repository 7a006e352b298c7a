"""TRL's side of `bench.rl`: GRPOTrainer, PPOTrainer and DPOTrainer as their documentation has them, by turns.

On a CPU there is no vLLM for GRPOTrainer: it generates with transformers. PPOTrainer takes its reward from a model and
ends no answer early unless it is told of a stop token; GRPOTrainer and ours are told not to end one. With `stop` all
three do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from bench.adapt_peers import arguments
from bench.rl_data import read_rows
from bench.rl_reward import digits
from bench.turns import Turns, run


class Finished(Exception):
    """The bench wants no more steps; PPOTrainer asks no callback whether it should stop."""


class Watch(TrainerCallback):
    """Reports a step's samples, and the figures that the parts below keep."""

    def __init__(self, turns: Turns, samples: int) -> None:
        self.turns, self.samples = turns, samples
        self.seconds, self.tokens, self.positions, self.counted = 0.0, 0, 0, 0

    def timed(self, generate: Callable[..., Any], size: Callable[[Any], tuple[int, int]]) -> Callable[..., Any]:
        """`generate`, whose time is taken. size: (tokens, answers) of what it returns."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            made = generate(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            tokens, answers = size(made)
            self.tokens, self.counted = self.tokens + tokens, self.counted + answers
            return made

        return timed

    def collated(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`collate`, whose real tokens and pairs are counted."""

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            mask = batch["attention_mask"]
            self.tokens, self.positions = self.tokens + int(mask.sum()), self.positions + mask.numel()
            self.counted += len(rows)
            return batch

        return counted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.turns.extra = {"rollout_seconds": self.seconds, "tokens_a_sample": self.tokens / self.counted}
        if self.positions:
            self.turns.extra["useful_share"] = self.tokens / self.positions
        if self.turns.after_step(self.samples):
            raise Finished
        return control


def grpo(spec: dict[str, Any], watch: Watch, common: dict[str, Any]) -> None:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **common | {"remove_unused_columns": False},
        num_generations=spec["group"],
        max_completion_length=spec["tokens"],
        generation_kwargs={} if spec["stop"] else {"min_new_tokens": spec["tokens"]},
        loss_type="grpo",
        use_transformers_continuous_batching=spec["setting"].get("continuous", False),
    )
    rows, rewards = Dataset.from_list(read_rows(spec["prompts"])), [cast(Any, digits)]
    trainer = GRPOTrainer(
        model=policy(spec), reward_funcs=rewards, args=args, train_dataset=rows,
        processing_class=tokenizer(spec), callbacks=[watch],
    )  # fmt: skip
    size = lambda made: (sum(map(len, made[0])), len(made[0]))  # noqa: E731
    trainer._generate_single_turn = watch.timed(trainer._generate_single_turn, size)  # type: ignore[method-assign]
    trainer.train()


def ppo(spec: dict[str, Any], watch: Watch, common: dict[str, Any]) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    args = PPOConfig(
        **common,
        total_episodes=10**6 * spec["batch"],
        response_length=spec["tokens"],
        temperature=1.0,
        num_ppo_epochs=spec["epochs"],
        num_mini_batches=1,
        num_sample_generations=0,
        stop_token="eos" if spec["stop"] else None,
        local_rollout_forward_batch_size=spec["setting"]["rollout"],
    )
    words = tokenizer(spec)
    asked = [row["prompt"] for row in read_rows(spec["prompts"])]
    ids = [words.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in asked]
    rows = Dataset.from_dict({"input_ids": ids})
    scorer = lambda: AutoModelForSequenceClassification.from_pretrained(  # noqa: E731
        spec["reward"], num_labels=1, dtype=torch.float32
    )
    trainer = PPOTrainer(
        args=args, processing_class=words, model=policy(spec), ref_model=policy(spec), reward_model=scorer(),
        value_model=scorer(), train_dataset=rows, eval_dataset=rows, callbacks=[watch],
    )  # fmt: skip
    longest = max(map(len, ids))
    size = lambda made: (made[0][:, longest:].numel(), len(made[0]))  # noqa: E731
    ppo_trainer.batch_generation = watch.timed(ppo_trainer.batch_generation, size)
    trainer.train()


def dpo(spec: dict[str, Any], watch: Watch, common: dict[str, Any]) -> None:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **common,
        max_length=spec["seq_len"],
        beta=0.1,
        train_sampling_strategy=spec["setting"].get("sampling", "random"),
        length_column_name="length",
    )
    rows = Dataset.from_list(read_rows(spec["pairs"]))
    trainer = DPOTrainer(
        model=policy(spec), ref_model=policy(spec), args=args, train_dataset=rows,
        processing_class=tokenizer(spec), callbacks=[watch],
    )  # fmt: skip
    trainer.data_collator = watch.collated(trainer.data_collator)
    trainer.train()


def policy(spec: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="sdpa", dtype=torch.float32)


def tokenizer(spec: dict[str, Any]) -> Any:
    """Padding must not be the token that ends a turn: PPOTrainer reads nothing of it."""
    words = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    if words.pad_token_id in (None, words.eos_token_id):
        words.pad_token = next(token for token in words.all_special_tokens if token != words.eos_token)
    return words


def main(spec: dict[str, Any], turns: Turns) -> None:
    torch.manual_seed(0)
    at_once = min(spec["setting"]["at_once"], spec["batch"])
    watch = Watch(turns, spec["batch"])
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(spec | {"accumulate": spec["batch"] // at_once, "peer": "trl"}, folder)
        common["gradient_checkpointing"] = spec["setting"].get("checkpointing", False)
        try:
            {"grpo": grpo, "ppo": ppo, "dpo": dpo}[spec["part"]](spec, watch, common)
        except Finished:
            return


if __name__ == "__main__":
    run(main)
