"""A small world of preferences, and losses of it written out document by document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_helpers import small_recipe

from groundup.config import build_recipe
from groundup.data.documents import Document, documents
from groundup.dist import World
from groundup.model.config import ModelConfig
from groundup.model.io import save_model
from groundup.model.transformer import Transformer
from groundup.objectives.preference import Answers, pair_losses, unpaired_losses
from groundup.tokenizer import load_tokenizer
from groundup.train.preference import Preference
from groundup.train.stage import Place
from groundup.train.start import Start, config_of, start

LORA = {"method": "lora", "rank": 4}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "conservative": {"loss": "dpo", "label_smoothing": 0.1},
    "forward_kl": {"loss": "dpo", "f_divergence_type": "forward_kl", "sft_weight": 0.3},
    "free": {"loss": "dpo", "reference": "none"},
    "robust": {"label_smoothing": 0.1},
    "ipo": {},
    "ipo summed": {"loss": "ipo", "average": False},
    "hinge": {},
    "simpo": {"beta": 2.0},
    "orpo": {},
    "apo_zero": {},
    "apo_down": {},
    "kto": {"desirable_weight": 1.3},
    "apo_zero_unpaired": {},
}


def told(name: str) -> dict[str, Any]:
    return {"loss": name} | LOSSES[name]


def make_land(root: Path, ground: Path) -> Path:
    """model/ (one that says something), pairs.jsonl (the chosen answers begin with `red dog`) and judged.jsonl."""
    tokenizer = load_tokenizer(ground / "tok")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 2, 1, 32, max_position_embeddings=256))
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    save_model(model, root / "model")
    tokenizer.save(root / "model")
    chats = [json.loads(line)["conversations"] for line in (ground / "chat.jsonl").read_text().splitlines()]
    pairs, judged = [], []
    for n, (asked, said) in enumerate(chats[:96]):
        sides = ("red dog " + said["content"], "far from home " + said["content"])
        pairs.append(
            {"prompt": [asked], "chosen": [{**said, "content": sides[0]}], "rejected": [{**said, "content": sides[1]}]}
        )
        judged.append({"messages": [asked, {**said, "content": sides[n % 2]}], "label": n % 2 == 0})
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tuned(land: Path, root: Path, preference: dict[str, Any], **changes: Any) -> dict[str, Any]:
    paired = preference.get("loss") not in ("kto", "apo_zero_unpaired")
    whole = {
        "stage": "preference",
        "data": str(land / ("pairs.jsonl" if paired else "judged.jsonl")),
        "train.seq_len": 128,
    }
    return small_recipe(land, root, **{**whole, "eval.fraction": 0.15, "preference": preference, **changes})


def opened(settings: dict[str, Any]) -> tuple[Preference, torch.nn.Module, Start]:
    """The stage of a recipe with its model, ready to train."""
    torch.set_num_threads(1)
    recipe = build_recipe(settings)
    source, tokenizer = Path(recipe.model), load_tokenizer(recipe.model)
    begun = start(recipe, config_of(recipe, source, tokenizer), source, tokenizer, torch.float32)
    stage = Preference(
        Preference.open(recipe, tokenizer, Path(settings["cache"])),
        recipe,
        Place(torch.device("cpu"), World()),
        tokenizer,
    )
    model = stage.prepare(begun)
    return stage, model.train(), begun


def alone(model: torch.nn.Module, document: Document) -> torch.Tensor:
    """log p of a document's answer, computed by itself, with all its logits."""
    ids, labels = torch.from_numpy(document.ids), torch.from_numpy(document.labels)
    logps = model(ids[None])[0].log_softmax(-1)
    kept = labels >= 0
    return logps[kept].gather(1, labels[kept, None]).sum()


def written_out(
    model: torch.nn.Module, base: torch.nn.Module | None, batch: Any, told: dict[str, Any], kl: float
) -> torch.Tensor:
    """The loss of a batch, its documents one by one."""
    found = [one for row in documents(batch) for one in row]
    logps = torch.stack([alone(model, one) for one in found])
    with torch.no_grad():
        others = torch.zeros(len(found)) if base is None else torch.stack([alone(base, one) for one in found])
    judged = Answers(logps, others, torch.tensor([float((one.labels >= 0).sum()) for one in found]))
    settings = {"beta": 0.1, **told}
    loss, weight = settings.pop("loss"), settings.pop("sft_weight", 0.0)
    settings.pop("reference", None)
    if loss in ("kto", "apo_zero_unpaired"):
        return unpaired_losses(judged, batch.wanted_D, settings.pop("beta"), kl, **settings).sum()
    settings.setdefault("margin", 0.5)
    total = pair_losses(loss, judged.side(0), judged.side(1), settings.pop("beta"), **settings).sum()
    return total - weight * judged.side(0).means.sum()


def moved(model: torch.nn.Module, by: float) -> None:
    """As if it had been trained for a while."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)


def mismatch_by_hand(window: list[Any], seq_len: int) -> list[Document]:
    """Every question of the step with the answer before it, around the end."""
    every = [one for batch in window for row in documents(batch) for one in row]
    made = []
    for asked, said in zip(every, [every[-1], *every[:-1]], strict=True):
        ids = [*asked.ids[: asked.begin], *said.ids[said.begin :]][:seq_len]
        labels = [-100] * len(ids)
        for k, label in enumerate(said.labels[said.begin - 1 : -1]):
            if asked.begin + k < len(ids):
                labels[asked.begin - 1 + k] = label
        made.append(Document(np.array(ids), np.array(labels)))
    return made
