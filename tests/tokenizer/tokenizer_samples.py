"""Random text and chats for the property tests: all from a seed."""

from __future__ import annotations

import random
from typing import Any

from groundup.tokenizer import SPECIAL_TOKENS

TEXTS = [
    "Mia lives in the blue house by the river. Her brother Tom has three cats and 12 hens.",
    "小明住在河边的蓝色房子里。他的姐姐有三只猫和12只鸡。今天天气很好，我们去公园吧。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(3, 4))\n",
    "Question: what is 25 + 17?\nAnswer: 42.\n\n问：二十五加十七是多少？\n答：四十二。\n",
    "user assistant system tool name arguments function type object string properties think",
]

ALPHABETS = [
    "abcdefg ABC 0123456789 \n\n  \t.,!?'\"{}[]<>|_/\\",
    "你好世界小明住在河边，。！？“”",
    "éüñßøж日本語한국어ไทยعربي",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u2764\ufe0f\U0001f1e8\U0001f1f3",
    "\x00\x01\x07\x0b\x1b\x7f\x85\u00a0\u2028\ufeff\ufffd\U000f0000\U0010fffd",
]


def text(rng: random.Random, specials: bool = False, length: int = 30) -> str:
    pieces = []
    for _ in range(rng.randrange(length)):
        if specials and rng.random() < 0.3:
            token = rng.choice(SPECIAL_TOKENS)
            pieces.append(rng.choice([token, token[: rng.randrange(len(token))], token[rng.randrange(len(token)) :]]))
        elif rng.random() < 0.05:
            code = rng.randrange(1, 0x110000)
            pieces.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        else:
            alphabet = rng.choice(ALPHABETS)
            pieces += rng.choices(alphabet, k=rng.randrange(1, 6))
    return "".join(pieces)


def chat(rng: random.Random, specials: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """A conversation of any shape the template knows, in the form transformers takes, and its tools."""

    def words() -> str:
        return text(rng, specials)

    messages: list[dict[str, Any]] = [{"role": "system", "content": words()}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": words()})
        if rng.random() < 0.4:
            calls = [{"name": f"tool_{i}", "arguments": {words(): words(), "n": i}} for i in range(rng.randrange(1, 3))]
            calls = [{"type": "function", "function": call} for call in calls]
            messages.append({"role": "assistant", "content": rng.choice(["", words()]), "tool_calls": calls})
            messages += [{"role": "tool", "content": words()} for _ in calls]
        answer = {"role": "assistant", "content": words()}
        if rng.random() < 0.5:
            answer["reasoning_content"] = words()
        messages.append(answer)
    function = {"name": "tool_0", "description": words(), "parameters": {"type": "object", "properties": {}}}
    return messages, [{"type": "function", "function": function}] * rng.randrange(3) or None
