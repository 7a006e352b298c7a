"""What do we learn from when nobody brought data? A small closed world. Open world.py first."""

from __future__ import annotations

from groundup.world.rows import Chat, Preference, Question, ReasoningPrompt, ToolEpisode
from groundup.world.world import World

__all__ = ["Chat", "Preference", "Question", "ReasoningPrompt", "ToolEpisode", "World"]
