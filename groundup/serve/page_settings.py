"""What can be set on the page? The side bar: language, chats, models, how to answer."""

from __future__ import annotations

import json
import os
from typing import Any

import streamlit as st

from groundup.serve.page_chat import Chat, Model, Settings
from groundup.serve.page_text import LANGUAGES, Say, language_of, speaker

MAX_COLUMNS = 3

# name, least, greatest, step: None where the server alone knows the limit. Whole numbers give whole numbers.
FIELDS: tuple[tuple[str, Any, Any, Any], ...] = (
    ("temperature", 0.0, 2.0, 0.1),
    ("max_tokens", 1, None, 64),
    ("top_p", 0.0, 1.0, 0.05),
    ("top_k", 0, None, 1),
    ("min_p", 0.0, 1.0, 0.01),
    ("seed", 0, None, 1),
    ("repetition_penalty", 0.1, 2.0, 0.05),
    ("presence_penalty", -2.0, 2.0, 0.1),
    ("frequency_penalty", -2.0, 2.0, 0.1),
)


def choose_language() -> Say:
    """A switch at the top; first the one in the address, then the browser's, then that of LANG."""
    if "language" not in st.session_state:
        asked = st.query_params.get("lang", "")
        locale = st.context.locale or os.environ.get("LC_ALL") or os.environ.get("LANG")
        st.session_state["language"] = asked if asked in LANGUAGES else language_of(locale)
    st.segmented_control(
        "Language · 语言",
        list(LANGUAGES),
        format_func=lambda name: LANGUAGES[name],
        key="language",
        label_visibility="collapsed",
        required=True,
    )
    language: str = st.session_state["language"]
    if st.query_params.get("lang") != language:
        st.query_params["lang"] = language  # a reload and a shared address keep it
    return speaker(language)


def choose_chat(say: Say) -> Chat:
    """The chat in hand; "New chat" puts it aside and the list brings one back. Leaving a chat stops its answer."""
    state = st.session_state
    chats: list[Chat] = state.setdefault("chats", [Chat()])
    current: Chat = state.setdefault("chat", chats[-1])

    def go(chat: Chat) -> None:
        state["chat"].stop()
        if not state["chat"].turns:
            chats.remove(state["chat"])
        if chat not in chats:
            chats.append(chat)
        state["chat"] = chat
        state["editing"] = False

    st.button(say("new_chat"), icon=":material/add:", key="new_chat", on_click=go, args=(Chat(),), width="stretch")
    others = [chat for chat in reversed(chats) if chat.turns]
    if len(others) > 1 or (others and others[0] is not current):
        with st.container(key="history", gap=None):
            for number, chat in enumerate(others):
                title = " ".join(chat.turns[0].text.split())[:40] or say("untitled")
                here = chat is current
                st.button(title, key=f"chat-{number}", type="tertiary", disabled=here, on_click=go, args=(chat,))
    return current


def choose_models(say: Say, models: list[Model]) -> list[Model]:
    """One model or adapter for each of 1 to 3 columns."""
    columns = st.segmented_control(
        say("columns"), list(range(1, MAX_COLUMNS + 1)), default=1, key="columns", required=True, width="stretch"
    )
    by_id = {model.id: model for model in models}

    def label(name: str) -> str:
        parent = by_id[name].parent
        return say("adapter", name=name, parent=parent) if parent in by_id and parent != name else name

    chosen: list[Model] = []
    for column in range(columns):
        title = say("model") if columns == 1 else say("model_of", number=column + 1)
        first = column % len(models)
        name = st.selectbox(title, list(by_id), index=first, format_func=label, key=f"model-{column}")
        chosen.append(by_id[name] if name else models[0])
    blind = next((model.id for model in chosen if not model.sees), None)
    if blind:
        st.caption(say("blind", model=blind))
    return chosen


def choose_settings(say: Say) -> Settings:
    """System text, sampling and tools. A field left empty is not sent."""
    system = st.text_area(say("system"), placeholder=say("system_hint"), key="system", height=90)
    with st.expander(say("sampling")):
        st.caption(say("sampling_hint"))
        thinking = st.segmented_control(
            say("thinking"), ["auto", "on", "off"], format_func=say, default="auto", key="thinking", required=True
        )
        values = _numbers(say)
    with st.expander(say("tools")):
        st.caption(say("tools_hint"))
        text = st.text_area(say("tools"), key="tools", height=160, label_visibility="collapsed")
        tools = _tools(say, text)
    return Settings(system=system, thinking={"on": True, "off": False}.get(thinking), tools=tools, **values)


def _numbers(say: Say) -> dict[str, Any]:
    values = {}
    left, right = st.columns(2)
    for number, (name, least, greatest, step) in enumerate(FIELDS):
        with left if number % 2 == 0 else right:
            values[name] = st.number_input(
                say(name),
                min_value=least,
                max_value=greatest,
                value=None,
                step=step,
                placeholder=say("default"),
                key=name,
            )
    return values


def _tools(say: Say, text: str) -> tuple[dict[str, Any], ...]:
    """The tools typed in, or none and one line saying why."""
    if not text.strip():
        return ()
    try:
        tools = json.loads(text)
        why = ""
    except ValueError as error:
        tools, why = None, str(error)
    if isinstance(tools, dict):
        tools = [tools]
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tuple(tools)
    st.error(say("tools_bad", why=why or say("tools_not_list")))
    return ()
