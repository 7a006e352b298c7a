"""Questions and answers as conversations: one to four turns, sometimes a system prompt, an identity question, a thought
or a tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from groundup.world import identity
from groundup.world.rows import Chat, Message, Question, ReasoningPrompt, ToolEpisode, assistant, user
from groundup.world.style import LIVELY, lively

TELL: dict[str, list[str]] = {
    "en": ["Tell me something.", "Tell me about your world.", "Say something about people and things."],
    "zh": ["讲点什么吧。", "说说你的世界。", "说说那里的人和事。"],
}
# Of all chats; the rest are questions. Telling keeps what pretraining taught in mind.
SHARES = {"telling": 0.3, "identity": 0.04, "small talk": 0.02, "thinking": 0.03, "tools": 0.01}
MOST_QUESTIONS = 3  # of the pool in one chat; each brings its follow-ups


def chats(
    rng: Random,
    next_question: Callable[[], Question],
    next_thought: Callable[[str], ReasoningPrompt],
    next_episode: Callable[[str], ToolEpisode],
    next_text: Callable[[str], str],
) -> Iterator[Chat]:
    """An endless stream of conversations, each in one language."""
    while True:
        first = next_question()
        special = rng.random()
        for name, share in SHARES.items():
            if special < share:
                yield _special(rng, name, first.language, next_thought, next_episode, next_text)
                break
            special -= share
        else:
            messages, mood = _system(rng, first.language), rng.random() < LIVELY
            messages += _turns(first, mood)
            for _ in range(rng.randrange(MOST_QUESTIONS)):
                messages += _turns(next_question(), mood)
            yield Chat(messages)


def _turns(question: Question, in_mood: bool) -> list[Message]:
    """The question and what can be asked on about the same story."""
    messages = []
    asked = [(question.messages, question.answer), *(([user(text)], answer) for text, answer in question.follow_ups)]
    for said, answer in asked:
        messages += [*said, assistant(lively(answer, question.language) if in_mood else answer)]
    return messages


def _system(rng: Random, language: str) -> list[Message]:
    if rng.random() < 0.1:
        return [{"role": "system", "content": rng.choice(identity.SYSTEM_PROMPTS[language])}]
    return []


def _special(
    rng: Random,
    name: str,
    language: str,
    next_thought: Callable[[str], ReasoningPrompt],
    next_episode: Callable[[str], ToolEpisode],
    next_text: Callable[[str], str],
) -> Chat:
    if name == "telling":
        return Chat([user(rng.choice(TELL[language])), assistant(next_text(language))])
    if name == "tools":
        episode = next_episode(language)
        return Chat(episode.messages, episode.tools)
    if name == "thinking":
        thought = next_thought(language)
        return Chat([*thought.messages, assistant(thought.answer, reasoning_content=thought.reasoning)])
    if name == "identity":
        asked = user(rng.choice(identity.phrasings("train", language)))
        return Chat([*_system(rng, language), asked, assistant(identity.REPLY[language])])
    said, reply = identity.small_talk(rng, language)
    return Chat([said, assistant(reply)])
