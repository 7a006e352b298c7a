"""The chat page: its data, its client, its logic without a browser, and all of it in a headless Chromium."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the chat page needs openai: pip install 'groundup[ui]'")
pytest.importorskip("fastapi", reason="the page's test server needs fastapi: pip install 'groundup[serve]'")
pytest.importorskip("uvicorn", reason="the page's test server needs uvicorn: pip install 'groundup[serve]'")

from page_server import REASONING, WAIT, Command, PageServer, free_port

from groundup.data.read import read_rows
from groundup.errors import UserError
from groundup.serve import ui as ui_module
from groundup.serve.page_chat import Answer, Chat, Fault, Model, Picture, Settings, ToolCall, Turn
from groundup.serve.page_client import Wire
from groundup.serve.page_text import LABELS, language_of, say_fault, speaker

PAGE = Path(ui_module.__file__).with_name("page.py")


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.release()
    server.close()


@pytest.fixture(autouse=True)
def _fresh(server: PageServer) -> None:
    server.reset()


# --- data ---------------------------------------------------------------------------------------------------------


def answered(content: str = "", model: str = "base", **rest: Any) -> Answer:
    return Answer(model, content=content, done=True, finish_reason="stop", **rest)


def test_only_settings_that_were_made_are_sent() -> None:
    assert Settings(system="be brief").request() == {}
    made = Settings(temperature=0.0, top_k=5, thinking=False, seed=3)
    extra = {"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}}
    assert made.request() == {"temperature": 0.0, "seed": 3, "extra_body": extra}


def test_each_column_has_its_own_past() -> None:
    chat = Chat([Turn("a", answers=[answered("left"), answered("right")]), Turn("b")])
    for column, content in enumerate(("left", "right", "left")):  # a third column has heard the first
        said = [m["content"] for m in chat.messages(column, "be brief", False)]
        assert said == ["be brief", "a", content, "b"]


def test_a_failed_turn_is_not_told_to_the_model() -> None:
    failed = Answer("base", done=True, fault=Fault("refused", "too long"))
    chat = Chat([Turn("a", answers=[failed]), Turn("b")])
    assert chat.messages(0, "", False) == [{"role": "user", "content": "b"}]


def test_pictures_go_to_models_that_see_only() -> None:
    chat = Chat([Turn("what is it?", [Picture(b"\x89PNG", "image/png")])])
    assert chat.messages(0, "", sees=False)[0]["content"] == "what is it?"
    picture, text = chat.messages(0, "", sees=True)[0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert text == {"type": "text", "text": "what is it?"}


def test_every_tool_call_is_followed_by_its_result() -> None:
    chat = Chat(
        [Turn("a", answers=[answered(calls=[ToolCall("c1", "f", "{}"), ToolCall("c2", "g", "{}")])]), Turn("b")]
    )
    said = chat.messages(0, "", False)
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "tool", "user"]
    assert [m["tool_call_id"] for m in said[2:4]] == [c["id"] for c in said[1]["tool_calls"]] == ["c1", "c2"]


def test_the_download_is_chat_data(tmp_path: Path) -> None:
    calls = [ToolCall("c1", "get_weather", '{"city": "上海"}')]
    chat = Chat([Turn("17 + 5?", answers=[answered("22", reasoning="Count on."), answered("23", "poet")])])
    chat.turns.append(Turn("and the weather?", answers=[answered(calls=calls), answered("fine", "poet")]))
    path = tmp_path / "chat.json"
    path.write_text(chat.to_json(Settings(system="be brief", top_p=0.9)), encoding="utf-8")
    left, right = read_rows(path)
    assert [m["role"] for m in left.messages] == ["system", "user", "assistant", "user", "assistant", "tool"]
    assert left.messages[2]["reasoning_content"] == "Count on."
    assert left.messages[4]["tool_calls"] == [{"name": "get_weather", "arguments": {"city": "上海"}}]
    assert right.messages[-1]["content"] == "fine"
    assert json.loads(path.read_text(encoding="utf-8"))[1]["settings"] == {"top_p": 0.9}


def test_both_languages_fill_the_same_fields() -> None:
    fields = dict.fromkeys("model name parent number why seconds tokens rate".split(), 1)
    for label, (english, chinese) in LABELS.items():
        for text in (english, chinese):
            assert text and text.format(**fields)
        used = [{name for name in fields if f"{{{name}" in text} for text in (english, chinese)]
        assert used[0] == used[1], label


def test_the_locale_chooses_the_language() -> None:
    assert [language_of(x) for x in ("zh-CN", "zh_CN.UTF-8", "en-US", "C", None)] == ["zh", "zh", "en", "en", "en"]


# --- client -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(server: PageServer) -> Callable[..., Answer]:
    """Ask through the real client, without waiting for the end."""
    wire = Wire(server.url, "none")

    def ask(text: str, settings: Settings | None = None, model: str = "base") -> Answer:
        answer = Answer(model)
        wire.ask(answer, [{"role": "user", "content": text}], settings or Settings())
        return answer

    return ask


def finished(answer: Answer) -> Answer:
    while not answer.done:
        assert answer.news.wait(WAIT), "no news"
        answer.news.clear()
    return answer


def test_models_adapters_and_eyes(server: PageServer) -> None:
    assert Wire(server.url, "none").models() == [Model("base"), Model("poet", "base"), Model("seer", sees=True)]


def test_a_stream_becomes_an_answer(ask: Callable[..., Answer], server: PageServer) -> None:
    answer = finished(ask("think of it", Settings(min_p=0.1)))
    assert (answer.content.strip(), answer.reasoning.strip()) == ("base says: think of it", REASONING)
    assert (answer.finish_reason, answer.tokens, answer.fault) == (
        "stop",
        len(f"{REASONING} base says: think of it".split()),
        None,
    )
    assert server.requests[0]["min_p"] == 0.1 and server.requests[0]["stream_options"] == {"include_usage": True}


def test_streamed_tool_calls_are_joined(ask: Callable[..., Answer]) -> None:
    (call,) = finished(ask("tool please")).calls
    assert (call.id, call.name, json.loads(call.pretty)) == ("c1", "get_weather", {"city": "上海", "days": 2})


def test_stopping_closes_the_connection(ask: Callable[..., Answer], server: PageServer) -> None:
    answer = ask("slow one")
    assert server.holding.wait(WAIT)
    while answer.content != "one two three ":
        assert answer.news.wait(WAIT)
        answer.news.clear()
    answer.stop()
    assert server.aborted.wait(WAIT), "the server was left generating"
    assert (finished(answer).finish_reason, answer.content) == ("stopped", "one two three ")


@pytest.mark.parametrize(
    ("question", "kind", "detail"),
    [("fail", "refused", "max_tokens: must be at least 1"), ("break", "broken", "")],
)
def test_faults_are_one_line(ask: Callable[..., Answer], question: str, kind: str, detail: str) -> None:
    fault = finished(ask(question)).fault
    assert fault is not None and fault.kind == kind and detail in fault.detail
    for language in ("en", "zh"):
        assert "\n" not in say_fault(speaker(language), fault)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    wire, answer = Wire(url, "none"), Answer("base")
    with pytest.raises(Fault) as caught:
        wire.models()
    wire.ask(answer, [], Settings())
    fault = finished(answer).fault
    assert fault is not None and fault.kind == caught.value.kind == "unreachable" and fault.detail == url


# --- the page without a browser -----------------------------------------------------------------------------------


@pytest.fixture
def app(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("streamlit", reason="the chat page needs streamlit: pip install 'groundup[ui]'")
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("GROUNDUP_UI_URL", server.url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    app = AppTest.from_file(PAGE, default_timeout=WAIT).run()
    assert not app.exception
    return app


def say(app: Any, text: str) -> Any:
    app.chat_input[0].set_value(text).run()
    assert not app.exception
    return app


def texts(app: Any) -> list[str]:
    return [element.value.strip() for element in [*app.text, *app.main.markdown]]


def test_question_answer_history(app: Any, server: PageServer) -> None:
    say(say(app, "hello"), "again")
    assert {"hello", "again", "base says: hello", "base says: again"} <= set(texts(app))
    said = server.requests[-1]["messages"]
    assert [m["content"].strip() for m in said] == ["hello", "base says: hello", "again"]


def test_settings_reach_the_server(app: Any, server: PageServer) -> None:
    app.text_area(key="system").set_value("be brief")
    app.number_input(key="temperature").set_value(0.5)
    app.number_input(key="top_k").set_value(7)
    app.number_input(key="max_tokens").set_value(33)
    app.button_group(key="thinking").set_value("on")
    app.text_area(key="tools").set_value('[{"type": "function", "function": {"name": "f"}}]').run()
    say(app, "hello")
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.5, 7, 33)
    assert sent["chat_template_kwargs"] == {"enable_thinking": True}
    assert sent["tools"][0]["function"]["name"] == "f"
    assert "top_p" not in sent and "seed" not in sent


def test_bad_tools_are_said_and_not_sent(app: Any, server: PageServer) -> None:
    app.text_area(key="tools").set_value("[{").run()
    assert "Tools are not sent" in app.error[0].value
    say(app, "hello")
    assert "tools" not in server.requests[-1]


def test_switching_the_language_keeps_what_was_set(app: Any) -> None:
    app.number_input(key="temperature").set_value(0.5).run()
    say(app, "hello")
    app.button_group(key="language").set_value("zh").run()
    assert app.button(key="new_chat").label == "新对话"
    assert app.number_input(key="temperature").value == 0.5
    assert "base says: hello" in texts(app)


def test_columns_answer_the_same_message(app: Any, server: PageServer) -> None:
    app.button_group(key="columns").set_value(3).run()
    app.selectbox(key="model-2").set_value("poet").run()
    say(app, "hello")
    assert sorted(r["model"] for r in server.requests) == ["base", "poet", "poet"]
    assert texts(app).count("poet says: hello") == 2


def test_an_error_keeps_the_message(app: Any, server: PageServer) -> None:
    say(app, "fail")
    assert "fail" in texts(app)
    assert app.error[0].value == "The request was refused: max_tokens: must be at least 1"
    assert app.button(key="regenerate").label == "Try again"
    app.button(key="regenerate").click().run()
    assert len(server.requests) == 2


def test_edit_and_regenerate_the_last(app: Any, server: PageServer) -> None:
    say(app, "hello")
    app.button(key="regenerate").click().run()
    assert [r["messages"] for r in server.requests] == [[{"role": "user", "content": "hello"}]] * 2
    app.button(key="edit").click().run()
    app.text_area(key="edit_text").set_value("goodbye")
    app.button(key="edit_send").click().run()
    assert "base says: goodbye" in texts(app) and "hello" not in texts(app)


def test_new_chat_and_back(app: Any) -> None:
    say(app, "hello")
    app.button(key="new_chat").click().run()
    assert texts(app) == []
    say(app, "other")
    app.button(key="chat-1").click().run()
    assert "base says: hello" in texts(app) and "other" not in texts(app)


def test_a_dead_server_is_said_and_can_be_retried(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("streamlit.testing.v1", reason="the chat page needs streamlit")
    monkeypatch.setenv("GROUNDUP_UI_URL", "http://127.0.0.1:9/v1")
    app = testing.AppTest.from_file(PAGE, default_timeout=WAIT).run()
    assert not app.exception and "http://127.0.0.1:9/v1" in app.error[0].value
    monkeypatch.setenv("GROUNDUP_UI_URL", server.url)
    app.button(key="retry").click().run()
    assert not app.error and app.chat_input[0].proto.placeholder == "Message base"


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"directory": None}, "groundup ui"),
        ({"directory": "x", "url": "http://h/v1"}, "groundup ui"),
        ({"directory": None, "url": "http://h/v1", "adapters": ["a=b"]}, "--adapter"),
        ({"directory": None, "url": "somewhere"}, "--url"),
    ],
)
def test_what_the_command_refuses(arguments: dict[str, Any], place: str) -> None:
    pytest.importorskip("streamlit", reason="the chat page needs streamlit: pip install 'groundup[ui]'")
    with pytest.raises(UserError) as caught:
        ui_module.ui(**arguments, port=free_port())
    assert caught.value.where == place


def test_a_port_in_use_is_said(server: PageServer) -> None:
    pytest.importorskip("streamlit", reason="the chat page needs streamlit: pip install 'groundup[ui]'")
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match="choose another --port"):
        ui_module.ui(None, url=server.url, port=port)


def children_of(pid: int) -> list[Any]:
    import psutil

    return psutil.Process(pid).children(recursive=True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_page(server: PageServer, how: signal.Signals) -> None:
    command = Command(None, server.url)
    with urllib.request.urlopen(command.address, timeout=WAIT) as response:
        assert response.status == 200
    children = children_of(command.process.pid)
    assert children
    assert command.stop(how) == 0
    assert not any(child.is_running() for child in children)
