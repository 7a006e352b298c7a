"""litgpt's pretraining step, taken from its `litgpt/pretrain.py` line by line: its GPT, its chunked cross entropy,
Lightning Fabric, clipping, AdamW (fused here, which its script has on GPUs only), torch.compile by setting.

Runs in an environment of its own (`python -m bench.peers install`), so it imports nothing of ours but turns.py.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from litgpt.model import GPT, Config
from litgpt.utils import chunked_cross_entropy

from bench.turns import Turns, run


def litgpt_config(config: dict[str, Any], seq_len: int) -> Config:
    """The same Qwen3 shape in litgpt's words (as its own Qwen3-0.6B entry spells it)."""
    return Config(
        block_size=seq_len,
        vocab_size=config["vocab_size"],
        padded_vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_query_groups=config["num_key_value_heads"],
        n_embd=config["hidden_size"],
        head_size=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        norm_class_name="RMSNorm",
        norm_eps=config["rms_norm_eps"],
        norm_qk=config["model_type"] == "qwen3",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )


def main(spec: dict[str, Any], turns: Turns) -> None:
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[spec["dtype"]]
    fabric = L.Fabric(devices=1, accelerator=spec["device"].split(":")[0], precision=precision)
    fabric.seed_everything(0)
    with fabric.init_module():
        model = GPT(litgpt_config(spec["config"], spec["seq_len"]))
    model.apply(model._init_weights)
    if spec["config"].get("tie_word_embeddings", True):
        model.transformer.wte.weight = model.lm_head.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if spec["compile"]:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(optimizer)

    arrays = np.load(spec["rows"])
    rows, real = torch.from_numpy(arrays["input_ids_BT"]), arrays["doc_ids_BT"][:, 1:] >= 0
    micro, step, done = spec["batch"] // spec["accumulate"], 0, False
    while not done:
        tokens = 0
        for part in range(spec["accumulate"]):
            first = (step * spec["accumulate"] + part) * micro
            chosen = np.arange(first, first + micro) % len(rows)
            batch = rows[chosen].to(fabric.device)
            tokens += int(real[chosen].sum())
            last = part == spec["accumulate"] - 1
            with fabric.no_backward_sync(model, enabled=not last):
                logits = model(batch[:, :-1].contiguous())
                loss = chunked_cross_entropy(logits, batch[:, 1:].contiguous(), chunk_size=spec["loss_chunk"])
                fabric.backward(loss / spec["accumulate"])
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        done = turns.after_step(tokens)


if __name__ == "__main__":
    run(main)
