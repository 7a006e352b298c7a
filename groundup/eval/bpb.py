"""How well is a text foreseen? Bits per byte: what the model, as a compressor, would need for each byte of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groundup.data.batch import PackedDataset, Source, open_dataset
from groundup.data.read import Reader
from groundup.data.rows import Text
from groundup.errors import UserError
from groundup.infer.quality import Quantized, quality
from groundup.model.prefix import prefix_length
from groundup.objectives.next_token import bits_per_byte, next_token

if TYPE_CHECKING:
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer

POSITIONS = 16384  # in one forward pass
SEQ_LEN = 1024  # longest stretch of text that sees itself, unless the model's context is shorter


def measure(model: Transformer, dataset: PackedDataset) -> dict[str, float]:
    """{"bits_per_byte", "loss" (nats per token), "tokens", "bytes"} of a packed dataset, every row once.

    The tokens are the targets: all after the first of a text (with the one that ends it), what the assistant says in a
    chat. The bytes are those of their text, UTF-8.
    """
    device = model.head_weight.device
    nats = 0.0
    with torch.no_grad():
        for batch in dataset.batches(max(1, POSITIONS // dataset.seq_len)):
            batch = batch.to(device)
            hidden_BTD = model.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
            nats += next_token(hidden_BTD, model.head_weight, batch.labels_BT)[0].item()
    tokens, size = dataset.trained_tokens, dataset.bytes
    if not size:
        raise UserError("data", "holds no byte that would be trained", "give texts, or chats with answers")
    return {
        "bits_per_byte": bits_per_byte(nats / tokens, tokens / size),
        "loss": nats / tokens,
        "tokens": tokens,
        "bytes": size,
    }


def measure_files(
    model: Transformer,
    tokenizer: Tokenizer,
    paths: Sequence[str | Path],
    seq_len: int | None = None,
    quantize: str | None = None,
) -> list[dict[str, Any]]:
    """`measure` of each file (text or chats, in any known format), with its name as "file" and its "kind".

    quantize: a scheme; "quantized" then says what it costs on this file (infer/quality.py).
    Text goes on from row to row of seq_len tokens without seeing the row before; chats are cut to one row.
    """
    length = min(seq_len or SEQ_LEN, model.config.max_position_embeddings - prefix_length(model.soft_prefix))
    results = []
    for path in paths:
        kind = "text" if isinstance(next(iter(Reader(path))), Text) else "chat"
        with tempfile.TemporaryDirectory() as cache:
            dataset, _ = open_dataset(
                [Source(str(path))], tokenizer, kind=kind, seq_len=length, cache_dir=cache, seed=0
            )
            results.append({"file": str(path), "kind": kind, **measure(model, dataset)})
            if quantize:
                found = quality(model, Quantized(model, quantize), dataset.batches(1), dataset.bytes)
                results[-1]["quantized"] = {"scheme": quantize, **found}
    return results
