"""Stage one: read. Every token of every document is foreseen from those before it in the same document."""

from __future__ import annotations

from groundup.train.stage import TokenStage


class Pretrain(TokenStage):
    """Documents `[bos] text [eos]`, packed into full rows; a document longer than a row goes on in another."""

    kind = "text"
