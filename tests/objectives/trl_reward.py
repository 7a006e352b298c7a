"""TRL's RewardTrainer over a tiny random model of ours, which it reads from our files: what it makes of four pairs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from groundup.model.config import ModelConfig
from groundup.model.scored import Scored, save_scorer
from groundup.model.transformer import Transformer

CHOSEN, REJECTED = (9, 5, 12, 7), (4, 8, 12, 3)  # tokens of the four pairs
MARGINS = (0.0, 0.5, 1.0, 0.25)
CENTRING = 0.03


def scored(seed: int = 3) -> Scored:
    """Scores that lie far enough apart, and norms whose weights are not 1."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    model = Transformer(ModelConfig(300, **sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))
    generator = torch.Generator().manual_seed(seed)
    made = Scored(model).drop_head()
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1))
    return made.eval()


def documents() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the chosen and the rejected side; each pair begins alike."""
    generator = torch.Generator().manual_seed(11)

    def some(count: int) -> list[int]:
        return torch.randint(5, 290, (count,), generator=generator).tolist()

    starts = [some(2) for _ in CHOSEN]
    return tuple([s + some(n - 2) for s, n in zip(starts, side, strict=True)] for side in (CHOSEN, REJECTED))  # type: ignore[return-value]


def figures() -> dict[str, Any]:
    """Scores, and the losses with and without margins and centring."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = reward_trainer(Path(folder), scored())
        chosen, rejected = documents()
        rows = [
            {"chosen_ids": c, "rejected_ids": r, "margin": m} for c, r, m in zip(chosen, rejected, MARGINS, strict=True)
        ]
        inputs = trainer.data_collator(rows)
        found: dict[str, Any] = {"cases": []}
        for margins in (False, True):
            for centring in (None, CENTRING):
                given = {k: v for k, v in inputs.items() if k != "margin" or margins}
                trainer.args.center_rewards_coefficient = centring
                trainer._metrics["eval"].clear()
                trainer.model.eval()
                with torch.no_grad():
                    loss, out = trainer.compute_loss(trainer.model, dict(given), return_outputs=True)
                told = {name: values[0] for name, values in trainer._metrics["eval"].items() if name != "num_tokens"}
                case = {"margins": list(MARGINS) if margins else [0.0] * 4, "centring": centring or 0.0}
                found["cases"].append(case | {"loss": loss.item(), "metrics": told})
        scores = out.logits.squeeze(-1).tolist()
        found |= {"chosen": scores[:4], "rejected": scores[4:]}
    return found


def reward_trainer(folder: Path, model: Scored) -> Any:
    """TRL's trainer of the model as transformers reads it from our files."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from groundup.tokenizer import train_tokenizer

    train_tokenizer(["yes or no, this or that?"] * 4, 300).save(folder / "model")
    save_scorer(model, folder / "model")
    args = RewardConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True
    )
    return RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder / "model"), args,
        train_dataset=Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
