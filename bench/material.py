"""What everybody trains on: the same text, the same tokenizer, the same rows, made once for a run of the bench."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import ROOT

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

SHARED = (ROOT / "shared" / "data", ROOT.parent / "shared" / "data")
TEXT = ("pretrain/mix_mini_zh_en.jsonl",)
SHORT = 500  # characters
WORLD = {"text": 40_000, "chats": 8_000}  # rows to write where there is no real data
CHATS = ("sft/chat_zh.jsonl", "sft/alpaca_zh.json")


def real(names: tuple[str, ...]) -> list[Path]:
    """These files of the shared data, or nothing where they are not all there."""
    for folder in SHARED:
        files = [folder / name for name in names]
        if all(file.exists() for file in files):
            return files
    return []


class Material:
    """Files under one work folder. Real data where it is found, else the built-in world."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = cache(self._tokenizer)

    @property
    def text(self) -> list[Path]:
        """Pretraining text, rows of {"text"}."""
        return real(TEXT) or [self._world("text")]

    @property
    def chats(self) -> list[Path]:
        """Conversations in the formats that people own."""
        return real(CHATS) or [self._world("chats")]

    @property
    def source(self) -> dict[str, list[str]]:
        """Names for the report."""
        return {"text": [path.name for path in self.text], "chats": [path.name for path in self.chats]}

    def documents(self) -> list[str]:
        """The pretraining texts themselves."""
        with self.text[0].open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]

    def spec(self, sources: list[Path], vocab_size: int) -> dict[str, Any]:
        """Where a program that reads files itself finds them."""
        return {
            "sources": [str(path) for path in sources],
            "tokenizer": str(self.tokenizer_dir(vocab_size)),
            "cache": str(self.work / "shards"),
        }

    @property
    def short_text(self) -> list[Path]:
        """The same text in documents of at most 500 characters: about three fit a row, and rows are 99 % full."""
        path = self.work / "short_text.jsonl"
        if not path.exists():
            with path.open("w", encoding="utf-8") as file:
                for text in self.documents():
                    for start in range(0, len(text), SHORT):
                        file.write(json.dumps({"text": text[start : start + SHORT]}, ensure_ascii=False) + "\n")
        return [path]

    def model(self, name: str, config: dict[str, Any], shape: Mapping[str, int]) -> str:
        """What our recipe calls the model: the preset's name, or a folder where its shape was replaced."""
        if not shape:
            return name
        from groundup.model.config import ModelConfig
        from groundup.model.io import save_model
        from groundup.model.transformer import Transformer

        folder = self.work / f"model-{name}"
        model = Transformer(ModelConfig.from_hf_dict(config))
        model.init_weights(0)
        save_model(model, folder)
        return str(folder)

    def _world(self, kind: str) -> Path:
        from groundup.world import World
        from groundup.world.write import chat_row, text_row, write_rows

        path = self.work / f"world_{kind}.jsonl"
        if not path.exists():
            world = World(0)
            rows = (
                map(text_row, world.documents(WORLD["text"]))
                if kind == "text"
                else map(chat_row, world.chats(WORLD["chats"]))
            )
            write_rows(path, rows)
        return path

    def tokenizer_dir(self, vocab_size: int) -> Path:
        """A tokenizer trained on the text, as a folder that transformers loads too."""
        self.tokenizer(vocab_size)
        return self.work / f"tokenizer-{vocab_size}"

    def _tokenizer(self, vocab_size: int) -> Tokenizer:
        from groundup.tokenizer import load_tokenizer, train_tokenizer

        folder = self.work / f"tokenizer-{vocab_size}"
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(self.documents(), vocab_size).save(folder)
        return load_tokenizer(folder)

    def packed_rows(self, vocab_size: int, seq_len: int, rows: int) -> Path:
        """Rows full of short documents (.npz of [rows, seq_len] arrays named as a Batch's fields are)."""
        import numpy as np

        from groundup.data.batch import Loader, open_dataset
        from groundup.data.mix import Source

        path = self.work / f"rows-{vocab_size}-{seq_len}-{rows}.npz"
        if not path.exists():
            sources = [Source(str(file)) for file in self.short_text]
            dataset, _ = open_dataset(
                sources,
                self.tokenizer(vocab_size),
                kind="text",
                seq_len=seq_len,
                cache_dir=self.work / "shards",
                seed=0,
            )
            batch = Loader(dataset, rows, seed=0).batch_at(0)
            names = ("input_ids_BT", "labels_BT", "position_ids_BT", "doc_ids_BT")
            np.savez(path, **{name: getattr(batch, name).numpy() for name in names})
        return path

    def chat_rows(self, vocab_size: int, max_len: int) -> Path:
        """Every conversation as it comes, cut to `max_len` (.npz: ids and mask end to end, and lengths), shuffled."""
        import numpy as np

        from groundup.data.shards import tokenize_files

        path = self.work / f"chats-{vocab_size}-{max_len}.npz"
        if not path.exists():
            shards = tokenize_files(
                self.chats, self.tokenizer(vocab_size), "chat", self.work / "shards", max_len=max_len
            )
            order = np.random.default_rng(0).permutation(len(shards))
            spans = [slice(int(shards.offsets[i]), int(shards.offsets[i + 1])) for i in order]
            columns: dict[str, Any] = {name: np.concatenate([getattr(shards, name)[span] for span in spans])
                                       for name in ("tokens", "mask")}  # fmt: skip
            np.savez(path, lengths=np.array([span.stop - span.start for span in spans]), **columns)
        return path
