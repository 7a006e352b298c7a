"""transformers' Trainer as its documentation recommends: Trainer.train() on rows that are packed before, or padded.

Fused AdamW, SDPA attention, no evaluation, no saving, no reporting. The turns live in a callback.
"""

from __future__ import annotations

import tempfile
from collections import deque
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from bench.turns import Turns, run


class TakeTurns(TrainerCallback):
    """Counts the real tokens of each batch when it is collated, and reports them when its step is done."""

    def __init__(self, turns: Turns, collate: Any, accumulate: int) -> None:
        self.turns, self.collate, self.accumulate = turns, collate, accumulate
        self.counts: deque[tuple[int, int]] = deque()  # Trainer collates ahead of the step that uses it
        self.useful = self.positions = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collate(rows)
        mask = batch.get("attention_mask", batch["labels"] != -100)  # packed rows: all but filler has a label
        self.counts.append((int(mask.sum()), mask.numel()))
        return batch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        done = [self.counts.popleft() for _ in range(self.accumulate)]
        useful, positions = (sum(column) for column in zip(*done, strict=True))
        self.useful, self.positions = self.useful + useful, self.positions + positions
        self.turns.extra = {"useful_share": self.useful / self.positions}
        control.should_training_stop = self.turns.after_step(useful)
        return control


def packed(path: str) -> list[dict[str, Any]]:
    """Pre-packed rows, all full: ids and labels (the model shifts them), no mask."""
    arrays = np.load(path)
    return [
        {"input_ids": row, "labels": np.where(docs < 0, -100, row)}
        for row, docs in zip(arrays["input_ids_BT"], arrays["doc_ids_BT"], strict=True)
    ]


def conversations(path: str) -> list[dict[str, Any]]:
    """One row a conversation; -100 where a token is not trained."""
    arrays = np.load(path)
    tokens, mask = arrays["tokens"].astype(np.int64), arrays["mask"]
    ends = np.cumsum(arrays["lengths"])
    spans = [slice(end - length, end) for end, length in zip(ends, arrays["lengths"], strict=True)]
    return [
        {
            "input_ids": tokens[span].tolist(),
            "attention_mask": [1] * (span.stop - span.start),
            "labels": np.where(mask[span] == 1, tokens[span], -100).tolist(),
        }
        for span in spans
    ]


def main(spec: dict[str, Any], turns: Turns) -> None:
    cpu = spec["device"] == "cpu"
    config = AutoConfig.for_model(**spec["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    if spec["rows_kind"] == "packed":
        rows, collate = packed(spec["rows"]), default_data_collator
    else:
        tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
        rows, collate = conversations(spec["rows"]), DataCollatorForSeq2Seq(tokenizer, padding="longest")
    hook = TakeTurns(turns, collate, spec["accumulate"])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec["batch"] // spec["accumulate"],
            gradient_accumulation_steps=spec["accumulate"],
            max_steps=10**6,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            train_sampling_strategy=spec.get("sampling", "random"),
            bf16=spec["dtype"] == "bf16",
            torch_compile=spec["compile"],
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model=model, args=args, train_dataset=rows, data_collator=hook, callbacks=[hook]).train()


if __name__ == "__main__":
    run(main)
