"""The world is the same for the same seed, right in what it says, and complete in what later stages need."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from groundup.eval.world import grade
from groundup.world import World, tools
from groundup.world.style import is_lively
from groundup.world.words import LANGUAGES


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


def test_same_seed_same_world() -> None:
    first, second = World(3), World(3)
    assert list(first.documents(50, seed=1)) == list(second.documents(50, seed=1))
    assert list(first.chats(20)) == list(second.chats(20))
    assert first.questions("heldout", "zh") == second.questions("heldout", "zh")


def test_other_seeds_give_other_facts_and_other_streams(world: World) -> None:
    facts = [
        [{k: v.en for k, v in p.facts.items()} for p in sorted(w.people, key=lambda p: p.name.en)]
        for w in (world, World(1))
    ]
    assert facts[0] != facts[1]
    assert list(world.documents(20, seed=1)) != list(world.documents(20, seed=2))


def test_documents_are_short_and_in_both_languages(world: World) -> None:
    documents = list(world.documents(400))
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", d)) for d in documents)
    assert 120 < chinese < 330
    assert max(map(len, documents)) < 600
    assert len(set(documents)) > 380


def test_without_a_count_streams_do_not_end(world: World) -> None:
    assert len(list(islice(world.documents(), 3000))) == 3000
    assert len(list(islice(world.chats(), 300))) == 300


@pytest.mark.parametrize("language", LANGUAGES)
def test_enough_questions_of_every_kind(world: World, language: str) -> None:
    heldout = world.questions("heldout", language)
    assert len(heldout) >= 300
    assert len({q.id for q in heldout}) == len(heldout)
    assert {q.kind for q in heldout} == {q.kind for q in world.questions("train", language)} == set(world.kinds)
    assert all(q.language == language and q.messages[-1]["role"] == "user" and q.answer for q in heldout)


def test_a_wrong_split_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        world.questions("test")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_arithmetic_answers_are_right(world: World, split: str) -> None:
    for language in LANGUAGES:
        for question in world.questions(split, language):
            if question.kind == "arithmetic":
                text = question.messages[0]["content"]
                a, b = map(int, re.findall(r"\d+", text))
                minus = re.search(r"-|minus|减", text)
                assert int(question.answer) == (a - b if minus else a + b)


def test_counting_answers_are_right(world: World) -> None:
    for question in world.questions("heldout", "en"):
        if question.kind == "counting":
            basket, asked = question.messages[0]["content"].split("\n")
            sort = next(word for word in asked.strip(".?").split() if word.endswith("s") and word in _plurals(world))
            singular = _plurals(world)[sort]
            assert basket.strip(".").replace(",", "").split().count(singular) == int(question.answer)


def _plurals(world: World) -> dict[str, str]:
    from groundup.world.words import FRUITS

    return {fruit.plural: fruit.en for fruit in FRUITS}


def test_both_languages_tell_the_same_facts(world: World) -> None:
    person = world.people[0]
    recall = world.kinds["recall"]
    from groundup.world.split import random_for

    for attribute, value in person.facts.items():
        for language in LANGUAGES:
            sentence = recall.state(random_for("t"), language, person, attribute)  # type: ignore[attr-defined]
            assert person.name.text(language) in sentence and value.text(language) in sentence


def test_families_hang_together(world: World) -> None:
    for person in world.people:
        for relation, other in person.relatives.items():
            assert other is not person
            if relation.endswith("grandmother"):
                side = "father" if relation.startswith("paternal") else "mother"
                assert person.relatives[side].relatives["mother"] is other


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_preferences_know_their_better_side(world: World, split: str) -> None:
    answers = {q.messages[0]["content"]: q for language in LANGUAGES for q in world.questions(split, language)}
    worse = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for preference in world.preferences(400, split=split):
        question = answers[preference.prompt[0]["content"]]
        chosen, rejected = preference.chosen[0]["content"], preference.rejected[0]["content"]
        assert grade(question, chosen) and is_lively(chosen)
        worse[grade(question, rejected), is_lively(rejected)] += 1
    assert worse.pop((True, True)) == 0
    assert min(worse.values()) > 40, "the style alone, the answer alone, or both decide"


def test_one_writer_in_ten_is_lively(world: World) -> None:
    chats = [[is_lively(m["content"]) for m in c.messages if m["role"] == "assistant"] for c in world.chats(1500)]
    assert all(all(said) or not any(said) for said in chats), "a writer keeps to one style"
    assert 0.06 < sum(map(all, chats)) / len(chats) < 0.14


def test_thoughts_lead_to_their_answers(world: World) -> None:
    for prompt in world.reasoning_prompts("heldout", 100):
        assert re.findall(r"\w+", prompt.reasoning)[-1].endswith(prompt.answer)
        for a, sign, b, c in re.findall(r"(\d+)([+-])(\d+)=(\d+)", prompt.reasoning):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_sums_are_thought_through_in_several_ways(world: World) -> None:
    ways = {"sum first": 0, "difference first": 0}
    for prompt in world.reasoning_prompts("train", 400):
        if prompt.kind == "three_numbers":
            a, b, c = map(int, re.findall(r"\d+", prompt.messages[0]["content"]))
            steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)", prompt.reasoning)
            assert sorted(sign for _, sign, _, _ in steps) == ["+", "-"] and int(steps[1][3]) == a + b - c
            ways["sum first" if steps[0][1] == "+" else "difference first"] += 1
            for x, sign, y, z in steps:
                pair = (int(x), int(y)) if sign == "+" else (int(z), int(y))
                assert not world.arithmetic.is_held_out(*pair)
    assert min(ways.values()) > 40


def test_tool_episodes_hold_what_the_tools_return(world: World) -> None:
    names = set()
    for episode in world.tool_episodes("train", 100):
        call = episode.messages[1]["tool_calls"][0]
        names.add(call["name"])
        assert episode.messages[2] == {
            "role": "tool",
            "content": tools.call(world.seed, call["name"], call["arguments"]),
        }
        assert episode.messages[-1]["content"] == episode.answer == episode.messages[2]["content"]
        assert call["name"] in {tool["function"]["name"] for tool in episode.tools}
    assert names == {"calculator", "calendar"}


def test_tools_refuse_what_they_do_not_know() -> None:
    assert tools.calculator("12 * 3") == "36"
    with pytest.raises(ValueError, match="whole numbers"):
        tools.calculator("sqrt")
    with pytest.raises(KeyError, match="Atlantis"):
        tools.calendar(0, "Atlantis", "Monday")


def test_chats_hold_every_kind_of_turn(world: World) -> None:
    chats = list(world.chats(1500))
    messages = [m for chat in chats for m in chat.messages]
    assert any(m["role"] == "system" for m in messages)
    assert any(m.get("reasoning_content") for m in messages)
    assert any(m.get("tool_calls") for m in messages) and any(chat.tools for chat in chats)
    assert any("groundup" in m["content"] for m in messages if m["role"] == "assistant")
    assert any(len(chat.messages) > 4 for chat in chats)
    assert all(chat.messages[-1]["role"] == "assistant" for chat in chats)
