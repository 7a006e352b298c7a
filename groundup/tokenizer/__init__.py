"""How does text become ids? Open bpe.py first, then chat.py."""

from __future__ import annotations

from groundup.tokenizer.bpe import SPECIAL_TOKENS, train_tokenizer
from groundup.tokenizer.folder import load_tokenizer
from groundup.tokenizer.report import report
from groundup.tokenizer.stream import StreamDecoder
from groundup.tokenizer.template import plain_template
from groundup.tokenizer.tokenizer import Rendered, Tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "plain_template",
    "report",
    "train_tokenizer",
]
