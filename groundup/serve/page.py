"""The chat page: `streamlit run` runs this file at every click. `groundup ui` starts it (see ui.py).

Environment: GROUNDUP_UI_URL, the server's base URL; OPENAI_API_KEY where the server wants one.
"""

from __future__ import annotations

import os
import time

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from groundup.serve.page_chat import Answer, Chat, Fault, Model, Picture, Settings, Turn
from groundup.serve.page_client import Wire
from groundup.serve.page_settings import choose_chat, choose_language, choose_models, choose_settings
from groundup.serve.page_style import CSS
from groundup.serve.page_text import Say, say_fault
from groundup.serve.page_view import AnswerView, draw_turn

PICTURES = ["png", "jpg", "jpeg", "webp"]
FRAME = 0.05  # seconds between two drawings of a growing answer


@st.cache_resource(show_spinner=False)
def wire_to(url: str, key: str) -> Wire:
    return Wire(url, key)


@st.cache_data(ttl=10, show_spinner=False)
def models_of(url: str, key: str) -> list[Model]:
    return wire_to(url, key).models()


def main() -> None:
    wide = st.session_state.get("columns", 1) > 1
    st.set_page_config("groundup", ":material/chat:", layout="wide" if wide else "centered")
    st.html(CSS)
    url = os.environ.get("GROUNDUP_UI_URL", "http://127.0.0.1:8000/v1")
    key = os.environ.get("OPENAI_API_KEY", "none")
    with st.sidebar:
        say = choose_language()
        chat = choose_chat(say)
    models = known_models(say, url, key)
    with st.sidebar:
        chosen = choose_models(say, models)
        settings = choose_settings(say)
        st.download_button(
            say("download"),
            chat.to_json(settings),
            file_name="chat.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            disabled=not chat.turns,
            width="stretch",
        )
    Conversation(wire_to(url, key), say, chat, chosen, settings).show()


def known_models(say: Say, url: str, key: str) -> list[Model]:
    """The server's models; while it is away the last ones known. Without any the page says so and ends here."""
    state = st.session_state
    try:
        state["models"] = models_of(url, key)
    except Fault as fault:
        if "models" not in state:
            st.error(say_fault(say, fault), icon=":material/error:")
            st.button(say("retry"), key="retry")
            st.stop()
    models: list[Model] = state["models"]
    return models


class Conversation:
    """The main column in one run of the script: what was said, what is being said, where to type."""

    def __init__(self, wire: Wire, say: Say, chat: Chat, chosen: list[Model], settings: Settings) -> None:
        self.wire, self.say, self.chat, self.chosen, self.settings = wire, say, chat, chosen, settings

    def show(self) -> None:
        stop = st.bottom.empty()  # before the input, and always there: else the input would lose what is typed
        self.read_input()
        chat, state = self.chat, st.session_state
        if not chat.turns:
            with st.container(key="greeting"):
                st.subheader(self.say("greeting"), anchor=False)
            return
        if chat.running:
            stop.button(self.say("stop"), icon=":material/stop_circle:", key="stop", on_click=chat.stop)
        editing = bool(state.get("editing")) and not chat.running
        views: list[AnswerView] = []
        for number, turn in enumerate(chat.turns[:-1] if editing else chat.turns):
            views = draw_turn(turn, number, self.say)
        if chat.running:
            self.watch(chat.turns[-1], views)
        elif editing:
            self.edit(chat.turns[-1])
        else:
            self.actions(chat.turns[-1])

    def read_input(self) -> None:
        """A message begins a turn; one that comes while an answer is being written ends that answer first."""
        seeing = all(model.sees for model in self.chosen)
        said = st.chat_input(
            self.say("placeholder", model=" · ".join(dict.fromkeys(model.id for model in self.chosen))),
            key="message",
            accept_file="multiple" if seeing else False,
            file_type=PICTURES,
        )
        if not said:
            return
        text = said if isinstance(said, str) else said.text
        files = [] if isinstance(said, str) else said.files
        self.chat.stop()
        st.session_state["editing"] = False
        self.chat.turns.append(Turn(text, [Picture(file.getvalue(), file.type) for file in files]))
        self.ask()

    def ask(self) -> None:
        """Put the last question to the model of every column."""
        turn = self.chat.turns[-1]
        turn.answers = [Answer(model.id) for model in self.chosen]
        for column, (model, answer) in enumerate(zip(self.chosen, turn.answers, strict=True)):
            answer.news = turn.answers[0].news
            self.wire.ask(answer, self.chat.messages(column, self.settings.system, model.sees), self.settings)

    def watch(self, turn: Turn, views: list[AnswerView]) -> None:
        """Draw the answers as they grow. Any click breaks in with a new run, which goes on watching; a closed tab or
        Streamlit's own stop ends the run for good, and then nobody waits for the answer any more. (With Streamlit's
        fastReruns every click is a stop: ui.py turns them off.)"""
        news = turn.answers[0].news
        try:
            while not turn.done:
                news.wait(0.2)
                news.clear()
                for view in views:
                    view.draw()
                time.sleep(FRAME)
        except StopException:
            turn.stop()
            raise
        st.rerun()  # draws the finished turn with its buttons

    def actions(self, turn: Turn) -> None:
        failed = any(answer.fault for answer in turn.answers)
        with st.container(key="actions", horizontal=True):
            label = self.say("retry" if failed else "regenerate")
            if st.button(label, icon=":material/refresh:", key="regenerate", type="tertiary"):
                self.ask()
                st.rerun()
            if st.button(self.say("edit"), icon=":material/edit:", key="edit", type="tertiary"):
                st.session_state["editing"] = True
                st.rerun()

    def edit(self, turn: Turn) -> None:
        """The last question in a box; sending it answers anew."""
        with st.form("edit_form"):
            text = st.text_area(self.say("edit"), turn.text, key="edit_text", label_visibility="collapsed")
            with st.container(horizontal=True):
                sent = st.form_submit_button(self.say("send"), type="primary", key="edit_send")
                left = st.form_submit_button(self.say("cancel"), key="edit_cancel")
        if sent or left:
            st.session_state["editing"] = False
            if sent:
                turn.text = text
                self.ask()
            st.rerun()


if __name__ == "__main__":
    main()
