"""Small made-up texts and chats."""

from __future__ import annotations

import random
from typing import Any

WORDS = "the cat sat on a mat and saw one bird 猫 坐 在 垫子 上 看 鸟 飞 过 了".split()


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words, most of them short."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=1 + int(longest * rng.random() ** 3))) + f" {i}." for i in range(count)]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
