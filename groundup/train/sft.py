"""Stage two: answer. Conversations are read whole, and only what the assistant says is foreseen.

The mask comes from the chat template's own marks (tokenizer/chat.py), so the end-of-turn token is trained: a model that
never learns to stop never stops.
"""

from __future__ import annotations

from groundup.train.stage import TokenStage


class SFT(TokenStage):
    """Conversations, packed into full rows; one longer than a row is cut turn by turn."""

    kind = "chat"
