"""From a jsonl file to tokens that a trainer can use: `python -m bench.peers.tokenise ours|datasets SPEC.json`.

Answers {seconds, map_seconds, tokens, rows}: the whole way from the file, and its tokenising alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.turns import claim_stdout


def ours(spec: dict[str, Any]) -> dict[str, float]:
    from groundup.data.shards import tokenize_files
    from groundup.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec["tokenizer"])
    began = time.perf_counter()
    shards = tokenize_files([spec["file"]], tokenizer, "text", spec["cache"], workers=spec["workers"])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "map_seconds": seconds, "tokens": len(shards.tokens), "rows": len(shards)}


def datasets(spec: dict[str, Any]) -> dict[str, float]:
    """`load_dataset` and a batched `map` with a fast tokenizer and several processes, as its documentation says."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
    began = time.perf_counter()
    rows = load_dataset("json", data_files=spec["file"], split="train", cache_dir=spec["cache"])
    loaded = time.perf_counter()
    tokens = rows.map(
        lambda batch: tokenizer(batch["text"], return_attention_mask=False),
        batched=True,
        num_proc=spec["workers"],
        remove_columns=rows.column_names,
    )
    done = time.perf_counter()
    count = sum(len(ids) for batch in tokens.with_format("arrow").iter(10_000) for ids in batch["input_ids"])
    return {"seconds": done - began, "map_seconds": done - loaded, "tokens": count, "rows": len(tokens)}


if __name__ == "__main__":
    pipe = claim_stdout()
    answer = {"ours": ours, "datasets": datasets}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    pipe.write(json.dumps(answer) + "\n")
