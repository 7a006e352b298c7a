"""LoRA as others train it, each in a process of its own: PEFT under transformers' Trainer, and under TRL's SFTTrainer.

Both as their documentation recommends for packed rows: PEFT's LoraConfig(target_modules="all-linear"), SDPA attention,
fused AdamW, no gradient checkpointing (nor have we), no evaluation, saving or reporting. Trainer gets our packed rows
with position_ids, from which transformers keeps documents apart; SFTTrainer gets the same conversations, tokenised and
masked, and packs them itself (packing=True).
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from bench.peers.trainer import TakeTurns, conversations
from bench.turns import Turns, run


def main(spec: dict[str, Any], turns: Turns) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        {"trainer": trainer, "trl": trl}[spec["peer"]](spec, turns, folder)


def trainer(spec: dict[str, Any], turns: Turns, folder: str) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    model = AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    hook = Counting(turns, default_data_collator, spec["accumulate"])
    Trainer(
        model=get_peft_model(model, lora(spec)),
        args=TrainingArguments(**arguments(spec, folder)),
        train_dataset=packed(spec["rows"]),
        data_collator=hook,
        callbacks=[hook],
    ).train()


def trl(spec: dict[str, Any], turns: Turns, folder: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="sdpa", dtype=torch.float32)
    chats = [{name: row[name] for name in ("input_ids", "labels")} for row in conversations(spec["chats"])]
    args = SFTConfig(
        **arguments(spec, folder),
        max_length=spec["seq_len"],
        packing=True,
        packing_strategy=spec["packing"],
        gradient_checkpointing=False,
    )
    sft = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=lora(spec),
    )
    hook = Counting(turns, sft.data_collator, spec["accumulate"])
    sft.data_collator = hook
    sft.add_callback(hook)
    sft.train()


class Counting(TakeTurns):
    """Real tokens of a batch: ours are known by their documents; what SFTTrainer packs is all real."""

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        real = [row.get("real") for row in rows]
        batch = self.collate([{name: value for name, value in row.items() if name != "real"} for row in rows])
        positions = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        useful = sum(real) if None not in real else positions if mask is None else int(mask.sum())
        self.counts.append((useful, positions))
        return batch


def packed(path: str) -> list[dict[str, Any]]:
    """Our packed rows as Trainer wants them: a label stands at its own token, not before it."""
    arrays = np.load(path)
    ids, targets = arrays["input_ids_BT"], arrays["labels_BT"]
    labels = np.concatenate([np.full_like(targets[:, :1], -100), targets[:, :-1]], axis=1)
    return [
        {"input_ids": i, "labels": l, "position_ids": p, "real": int((d >= 0).sum())}
        for i, l, p, d in zip(ids, labels, arrays["position_ids_BT"], arrays["doc_ids_BT"], strict=True)
    ]


def lora(spec: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """TrainingArguments that both share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": spec["batch"] // spec["accumulate"],
        "gradient_accumulation_steps": spec["accumulate"],
        "max_steps": 10**6,
        "learning_rate": spec["lr"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine",
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": spec["device"] == "cpu",
        "dataloader_pin_memory": spec["device"] != "cpu",
        "remove_unused_columns": spec["peer"] == "trl",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    run(main)
