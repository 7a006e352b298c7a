"""TRL's preference trainers over two tiny random models: what they make of four pairs, whatever the loss."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PROMPT, CHOSEN, REJECTED = (3, 2, 4, 2), (4, 1, 6, 3), (2, 5, 3, 7)  # tokens of the four pairs
# Our loss and settings, TRL's attributes.
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss": "dpo"}, {"loss_types": ["sigmoid"]}),
    ({"loss": "dpo", "beta": 0.7}, {"loss_types": ["sigmoid"]}),
    ({"loss": "dpo", "average": True}, {"loss_types": ["sigmoid_norm"]}),
    ({"loss": "robust", "label_smoothing": 0.1}, {"loss_types": ["robust"]}),
    ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
    ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
    ({"loss": "apo_zero"}, {"loss_types": ["apo_zero"]}),
    ({"loss": "apo_down"}, {"loss_types": ["apo_down"]}),
    *(
        ({"loss": loss, "f_divergence_type": kind} | more, {"loss_types": [theirs]})
        for loss, theirs in (("dpo", "sigmoid"), ("ipo", "ipo"))
        for kind, more in (
            ("forward_kl", {}), ("js_divergence", {}),
            ("alpha_divergence", {"f_alpha_divergence_coef": 0.3}),
            ("alpha_divergence", {"f_alpha_divergence_coef": 1.0}),
        )
    ),
]  # fmt: skip
# Those whose loss is a method of log probabilities alone.
FREE: list[dict[str, Any]] = [
    {"loss": "simpo", "beta": 2.0, "margin": 1.0},
    {"loss": "simpo", "beta": 2.5, "margin": 0.5, "label_smoothing": 0.1},
    {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2},  # conservative, without a reference
    {"loss": "orpo", "beta": 0.1},
]
BETA = 0.2
WANTED = (True, False, True, True)


def figures() -> dict[str, Any]:
    """All losses, and the log probabilities that they come from."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(Path(folder))
        inputs = pairs()
        logps, reference = (sums(trainer, model, inputs) for model in (trainer.model, trainer.ref_model))
        found: dict[str, Any] = {
            "chosen": {"logps": logps[0], "reference": reference[0], "tokens": list(CHOSEN)},
            "rejected": {"logps": logps[1], "reference": reference[1], "tokens": list(REJECTED)},
            "pairs": [{**ours, **told_dpo(trainer, inputs, ours, theirs)} for ours, theirs in PAIRS],
            "free": [{**ours, "value": free_loss(ours, *logps)} for ours in FREE],
        }
        found["unpaired"] = kto(Path(folder))
    return found


def model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=1, **sizes, initializer_range=0.3))
    return made.eval()


def options(folder: Path) -> dict[str, Any]:
    """Of a trainer that writes nothing, and rows for its constructor, which wants some."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from groundup.tokenizer import train_tokenizer

    train_tokenizer(["yes or no, this or that?"] * 4, 300).save(folder / "tokenizer")
    row = {"prompt": ["this?"] * 2, "chosen": ["yes"] * 2, "rejected": ["no"] * 2, "completion": ["yes", "no"]}
    row["label"] = [True, False]
    return {"processing_class": AutoTokenizer.from_pretrained(folder / "tokenizer"), "rows": Dataset.from_dict(row)}


def dpo_trainer(folder: Path, policy: Any = None, reference: Any = None) -> Any:
    from trl import DPOConfig, DPOTrainer

    told = options(folder)
    args = DPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True
    )
    rows = told["rows"].select_columns(["prompt", "chosen", "rejected"])
    return DPOTrainer(
        policy or model(0), reference or model(1), args, train_dataset=rows, processing_class=told["processing_class"]
    )


def padded(documents: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """(ids, length of the prompt) as TRL's collator pads them."""
    longest = max(len(ids) for ids, _ in documents)
    shape = len(documents), longest
    ids, there, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, (tokens, prompt) in enumerate(documents):
        ids[row, : len(tokens)], there[row, : len(tokens)] = torch.tensor(tokens), 1
        mask[row, prompt : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": there, "completion_mask": mask}


def conversations(lengths: tuple[int, ...], seed: int) -> list[tuple[list[int], int]]:
    prompts, answers = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)

    def some(count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(5, 290, (count,), generator=generator).tolist()

    return [(some(p, prompts) + some(a, answers), p) for p, a in zip(PROMPT, lengths, strict=True)]


def pairs() -> dict[str, Tensor]:
    return padded(conversations(CHOSEN, 8) + conversations(REJECTED, 9))


def sums(trainer: Any, of: Any, inputs: dict[str, Tensor]) -> list[list[float]]:
    return [part.tolist() for part in trainer.compute_ref_log_probs(of, inputs)]


def told_dpo(trainer: Any, inputs: dict[str, Tensor], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Loss and metrics of DPOTrainer with these settings."""
    trainer.loss_types, trainer.beta = theirs["loss_types"], ours.get("beta", BETA)
    trainer.label_smoothing = ours.get("label_smoothing", 0.0)
    trainer.f_divergence_type = ours.get("f_divergence_type", "reverse_kl")
    trainer.f_alpha_divergence_coef = ours.get("f_alpha_divergence_coef", 0.5)
    trainer._metrics["eval"].clear()
    with torch.no_grad():
        value = trainer._compute_loss(trainer.model, inputs, False).item()
    metrics = {
        name: values[0] for name, values in trainer._metrics["eval"].items() if "/" in name and "logits" not in name
    }
    return {"beta": trainer.beta, "value": value, "metrics": metrics}


def free_loss(ours: dict[str, Any], chosen: list[float], rejected: list[float]) -> float:
    """CPOTrainer's and ORPOTrainer's, without the cross entropy."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    told = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=ours["beta"], alpha=0.0)
    told.label_smoothing, told.simpo_gamma = ours.get("label_smoothing", 0.0), ours.get("margin", 0.0)
    logps = [torch.tensor(side) for side in (chosen, rejected)]
    if ours["loss"] != "dpo":
        logps = [side / torch.tensor(tokens) for side, tokens in zip(logps, (CHOSEN, REJECTED), strict=True)]
    if ours["loss"] == "orpo":
        return -ORPOTrainer.odds_ratio_loss(told, *logps)[0].mean().item()
    told.loss_type = "simpo" if ours["loss"] == "simpo" else "sigmoid"
    return CPOTrainer.cpo_loss(told, *logps)[0].mean().item()


def kto_trainer(folder: Path, policy: Any = None, reference: Any = None) -> Any:
    from trl import KTOConfig, KTOTrainer

    told = options(folder)
    args = KTOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        per_device_train_batch_size=2, loss_type="kto",
    )  # fmt: skip
    rows = told["rows"].select_columns(["prompt", "completion", "label"])
    return KTOTrainer(
        policy or model(0), reference or model(1), args, train_dataset=rows, processing_class=told["processing_class"]
    )


def kto(folder: Path) -> dict[str, Any]:
    """KTOTrainer over the chosen answers, some of them unwanted; each question also with the answer before."""
    trainer = kto_trainer(folder)
    said = conversations(CHOSEN, 8)
    others = [(ids[:p] + before[q:], p) for (ids, p), (before, q) in zip(said, [said[-1], *said], strict=False)]
    inputs = padded(said) | {f"KL_{name}": value for name, value in padded(others).items()}
    inputs["label"] = torch.tensor(WANTED)
    found: dict[str, Any] = {"tokens": list(CHOSEN), "wanted": list(WANTED)}
    for name, of in (("logps", trainer.model), ("reference", trainer.ref_model)):
        own, kl = trainer.compute_ref_log_probs(of, inputs)
        found[name], found[f"kl_{name}"] = own.tolist(), kl.tolist()
    found["losses"] = []
    for loss, beta, good, poor in (
        ("kto", 0.2, 1.0, 1.0),
        ("kto", 0.05, 1.5, 0.5),
        ("apo_zero_unpaired", 0.2, 1.0, 1.0),
    ):
        trainer.loss_type, trainer.calculate_KL, trainer.beta = loss, loss == "kto", beta
        trainer.desirable_weight, trainer.undesirable_weight = good, poor
        trainer._metrics["eval"].clear()
        with torch.no_grad():
            value = trainer._compute_loss(trainer.model, inputs, False).item()
        kept = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
        metrics = {key: trainer._metrics["eval"][key][0] for key in kept}
        told = {"loss": loss, "beta": beta, "desirable_weight": good, "undesirable_weight": poor}
        found["losses"].append(told | {"value": value, "metrics": metrics})
    return found
