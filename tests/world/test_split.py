"""Nothing that is held out is asked in training, in any words; facts, sums and calendar steps are told."""

from __future__ import annotations

import re

import pytest

from groundup.eval.world import CopyBaseline, evaluate_world
from groundup.world import World, identity
from groundup.world.kinds.recall import QUESTIONS, Recall
from groundup.world.kinds.translation import Translation
from groundup.world.people import ATTRIBUTES
from groundup.world.split import held_out, random_for
from groundup.world.words import LANGUAGES, counted


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def training(world: World) -> list[str]:
    """Much of what a model may see in training: documents, chats, thoughts, preferences."""
    texts = list(world.documents(6000, seed=5))
    texts += [
        m["content"] + "\n" + m.get("reasoning_content", "")
        for chat in world.chats(3000, seed=5)
        for m in chat.messages
    ]
    texts += [
        prompt.messages[0]["content"] + "\n" + prompt.reasoning for prompt in world.reasoning_prompts("train", 500)
    ]
    return texts


def test_no_heldout_question_is_asked_in_training(world: World, training: list[str]) -> None:
    asked = set(training)
    for language in LANGUAGES:
        questions = {q.messages[0]["content"] for q in world.questions("heldout", language)}
        assert not questions & asked
        assert not questions & {q.messages[0]["content"] for q in world.questions("train", language)}


def test_heldout_facts_are_asked_in_no_words_but_told(world: World, training: list[str]) -> None:
    recall = world.kinds["recall"]
    assert isinstance(recall, Recall)
    held = [(p, a) for p in world.people for a in ATTRIBUTES if recall.is_held_out(p, a)]
    assert 15 < len(held) < 60
    asked, told = set(training), "\n".join(training)
    for person, attribute in held:
        for language in LANGUAGES:
            for template in QUESTIONS[attribute][language]:
                assert template.format(p=person.name.text(language)) not in asked
    rng = random_for("test")
    statements = [recall.state(rng, language, p, a) for p, a in held for language in LANGUAGES]
    assert sum(statement in told for statement in statements) > 0.5 * len(statements)


def held_out_sums(world: World, texts: list[str]) -> tuple[int, int]:
    """(sums, held-out ones among them). Sums of three numbers and long ones have no pair to hold out."""
    found = held = 0
    for text in texts:
        if re.search(r"\d{3}|\d[+]\d+-", text):
            continue
        for a, sign, b in re.findall(r"(\d+)(\+| plus |加|-| minus |减)(\d+)", text):
            first = int(a) if sign in ("+", " plus ", "加") else int(a) - int(b)
            found, held = found + 1, held + world.arithmetic.is_held_out(first, int(b))
    return found, held


def test_heldout_sums_are_told_but_never_asked(world: World) -> None:
    asked = [m["content"] for chat in world.chats(3000, seed=5) for m in chat.messages if m["role"] == "user"]
    asked += [prompt.messages[0]["content"] for prompt in world.reasoning_prompts("train", 500)]
    found, held = held_out_sums(world, asked)
    assert found > 300
    assert held == 0
    assert held_out_sums(world, list(world.documents(6000, seed=5)))[1] > 100


def test_heldout_phrases_stand_nowhere(world: World, training: list[str]) -> None:
    translation = world.kinds["translation"]
    assert isinstance(translation, Translation)
    told, rng = "\n".join(training), random_for("test")
    for _ in range(100):
        phrase = translation.draw(rng, held_out=True)
        for language in LANGUAGES:
            text = counted(*phrase, language)
            assert not re.search(rf"(?<!\w){re.escape(text)}(?!\w)", told), text


def test_the_split_is_a_property_of_the_combination() -> None:
    assert held_out(0, "kind", "a", 1) == held_out(0, "kind", "a", 1)
    share = sum(held_out(0, "kind", i) for i in range(10_000)) / 10_000
    assert 0.18 < share < 0.22
    assert any(held_out(0, "kind", i) != held_out(1, "kind", i) for i in range(20))


def test_identity_phrasings_are_disjoint(world: World) -> None:
    for language in LANGUAGES:
        assert not set(identity.phrasings("train", language)) & set(identity.phrasings("heldout", language))
        assert world.identity_questions("heldout", language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_copying_the_nearest_answer_fails(world: World, language: str) -> None:
    baseline = CopyBaseline(world.questions("train", language))
    result = evaluate_world(world.questions("heldout", language), baseline)
    assert result[f"world_exact_{language}"] < 0.2
    kinds = result["kinds"][language]
    assert kinds.pop("counting") < 0.75  # a basket with other sorts and the same numbers has the same answer
    assert max(kinds.values()) < 0.5
    train = world.questions("train", language)[::50]
    assert evaluate_world(train, baseline)[f"world_exact_{language}"] == 1.0  # it does find what it has seen
