"""One object for everything between text and ids, around a `tokenizers` backend."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from groundup.errors import UserError
from groundup.tokenizer.plain import Plain


@dataclass(frozen=True)
class Rendered:
    """A chat as the model sees it. mask[i] is 1 where ids[i] is something the assistant says (a trained token).

    context: why an answer is context alone, for each that is (the template shows it otherwise than it was said).
    """

    ids: list[int]
    mask: list[int]
    text: str
    context: tuple[UserError, ...] = ()


class Tokenizer:
    """Text to ids and back, and chats to ids with the mask of trained tokens.

    backend: the stock tokenizer, in which special tokens count wherever they are spelled.
    config: tokenizer_config.json as a dict. chat_template: Jinja source, "" where the folder has none.
    more_stop_ids: ends of an answer named beside the tokenizer (generation_config.json). where: for messages.
    """

    def __init__(
        self,
        backend: Backend,
        config: dict[str, Any],
        chat_template: str,
        more_stop_ids: tuple[int, ...] = (),
        where: str = "tokenizer",
    ) -> None:
        self.backend, self.config, self.chat_template = backend, config, chat_template
        self.more_stop_ids, self.where = more_stop_ids, where
        self.special = {name: text for name in _ROLES if (text := _spelling(config.get(name)))}
        found = {name: backend.token_to_id(text) for name, text in self.special.items()}
        eos, pad, bos = (found.get(name) for name in _ROLES[:3])
        if eos is None:
            raise UserError(where, "names no eos_token that is in its vocabulary", "set it in tokenizer_config.json")
        # Qwen has no bos; its pad, <|endoftext|>, is what stands between documents.
        self.eos_id: int = eos
        self.pad_id: int = eos if pad is None else pad
        self.bos_id: int = self.pad_id if bos is None else bos
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes build their own plain twin: its setting is not part of the backend's pickle.
        return Tokenizer, (self.backend, self.config, self.chat_template, self.more_stop_ids, self.where)

    @cached_property
    def plain(self) -> Plain:
        return Plain(self.backend, self.chat_template)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: eos, those of generation_config.json, and what the chat template ends a turn with."""
        from groundup.tokenizer.chat import turn_end

        return sorted({self.eos_id, *self.more_stop_ids, *turn_end(self)})

    @cached_property
    def keeps_past(self) -> bool:
        """Whether the chat template leaves earlier turns as they were when a chat goes on."""
        from groundup.tokenizer.check import keeps_past

        return keeps_past(self)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: nothing is added, and spellings of special tokens stay text."""
        return self.plain.ids(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of many texts, on all cores, without the GIL (TOKENIZERS_PARALLELISM=false: on one)."""
        return self.plain.ids_batch(texts)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. For ids that arrive one by one: StreamDecoder."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> Rendered:
        """A chat as ids, with the mask of what the assistant says. See chat.py."""
        from groundup.tokenizer.chat import render  # jinja2 costs 30 ms that plain text need not pay

        return render(self, messages, tools, add_generation_prompt, enable_thinking)

    def save(self, dir: str | Path) -> None:
        """Write a stock folder: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
        from groundup.tokenizer.folder import save_tokenizer

        save_tokenizer(self, Path(dir))

    def fingerprint(self) -> str:
        """Hash of all that decides which ids a text or a chat gets."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self.backend.to_str(), self.chat_template, repr(sorted(self.special.items()))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


_ROLES = ("eos_token", "pad_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _spelling(token: Any) -> str | None:
    """tokenizer_config.json writes a token as text, or as an object with "content"."""
    return token.get("content") if isinstance(token, dict) else token
