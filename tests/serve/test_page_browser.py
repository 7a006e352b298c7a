"""The chat page in a headless Chromium: type, stream, stop, switch, at desk and phone width.

GROUNDUP_SCREENSHOTS=docs/images python -m pytest tests/serve/test_page_browser.py -k screenshots
draws the pictures of the documentation anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH (Debian: apt install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="driving the browser needs playwright")
pytest.importorskip("streamlit", reason="the chat page needs streamlit: pip install 'groundup[ui]'")
pytest.importorskip("openai", reason="the chat page needs openai: pip install 'groundup[ui]'")
pytest.importorskip("fastapi", reason="the page's test server needs fastapi: pip install 'groundup[serve]'")
pytest.importorskip("uvicorn", reason="the page's test server needs uvicorn: pip install 'groundup[serve]'")

from page_server import REASONING, TOOL_ARGUMENTS, WAIT, Command, PageServer  # noqa: E402  after the reasons to skip

expect = sync_api.expect
expect.set_options(timeout=1000 * WAIT)
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.release()
    server.close()


@pytest.fixture(scope="module")
def address(server: PageServer) -> Iterator[str]:
    command = Command(url=server.url)
    yield command.address
    command.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str, server: PageServer) -> Iterator[Callable[..., Any]]:
    """open_page(width=..., locale=...): a fresh visitor on the page."""
    server.reset()
    contexts = []

    def open_page(at: str = address, width: int = 1280, height: int = 800, locale: str = "en-US") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
        contexts.append(context)
        page = context.new_page()
        page.goto(at)
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()


def say(page: Any, text: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(text)
    box.press("Enter")


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option).click()


def test_type_stream_stop(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    say(page, "slow one")
    expect(page.get_by_text("one two three")).to_be_visible()  # on the page while the server still holds
    assert server.holding.is_set() and not server.aborted.is_set()
    page.get_by_role("button", name="Stop").click()
    assert server.aborted.wait(WAIT), "the server was left generating"
    expect(page.get_by_text("Stopped")).to_be_visible()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    say(page, "hello")
    expect(page.get_by_text("base says: hello")).to_be_visible()
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["slow one", "one two three ", "hello"]


def test_other_clicks_do_not_cut_an_answer(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    say(page, "slow one")
    expect(page.get_by_text("one two three")).to_be_visible()
    page.get_by_test_id("stSidebar").get_by_text("中文").click()
    expect(page.get_by_role("button", name="停止")).to_be_visible()
    assert not server.aborted.is_set()
    server.release()
    expect(page.get_by_text("base says: slow one")).to_be_visible()
    expect(page.get_by_role("button", name="重新生成")).to_be_visible()


def test_closing_the_tab_ends_the_answer(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    say(page, "slow one")
    expect(page.get_by_text("one two three")).to_be_visible()
    page.close()
    assert server.aborted.wait(WAIT), "the server was left generating for nobody"


def test_switch_the_model(open_page: Callable[..., Any]) -> None:
    page = open_page()
    choose(page, "Model", "poet")
    say(page, "hello")
    expect(page.get_by_text("poet says: hello")).to_be_visible()


def test_the_language_is_the_browsers_and_a_reload_keeps_the_choice(open_page: Callable[..., Any]) -> None:
    page = open_page(locale="zh-CN")
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    page.get_by_text("English").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    expect(page).to_have_url(re.compile("lang=en"))
    page.reload()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()


def test_thinking_is_open_while_it_comes_then_folded(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    say(page, "think slow")
    expect(page.get_by_text("Seventeen and five")).to_be_visible()
    server.release()
    expect(page.get_by_text("Thought for")).to_be_visible()
    expect(page.get_by_text("Seventeen and five")).not_to_be_visible()
    page.get_by_text("Thought for").click()
    expect(page.get_by_text("Seventeen and five")).to_be_visible()


def test_pictures_only_for_a_model_that_sees(open_page: Callable[..., Any], server: PageServer) -> None:
    page = open_page()
    expect(page.get_by_text("Pictures are off: base reads text only.")).to_be_visible()
    expect(page.get_by_test_id("stChatInputFileUploadButton")).to_have_count(0)
    choose(page, "Model", "seer")
    expect(page.get_by_test_id("stChatInputFileUploadButton")).to_be_visible()
    picture = {"name": "dot.png", "mimeType": "image/png", "buffer": PIXEL}
    with page.expect_response(lambda answer: answer.request.method == "PUT"):  # until then nothing can be sent
        page.get_by_test_id("stChatInputFileUploadButton").locator("input[type=file]").set_input_files(picture)
    expect(page.get_by_text("dot.png")).to_be_visible()
    say(page, "what is it?")
    expect(page.get_by_text("seer says: what is it?")).to_be_visible()
    sent = server.requests[-1]["messages"][-1]["content"]
    assert sent[0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_nothing_runs_over_the_edge_of_a_phone(open_page: Callable[..., Any]) -> None:
    width = 360
    page = open_page(width=width)
    say(page, "tool " + "x" * 200)
    expect(page.get_by_text("get_weather")).to_be_visible()
    say(page, "a" * 300)
    expect(page.get_by_text("base says: aaa")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.get_by_test_id("stChatInputTextArea").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


ENGLISH: dict[str, dict[str, str]] = {
    "Who lives in the mill, and how do you know?": {
        "content": "**Mara** lives in the mill. The story says so twice:\n\n"
        "1. she *carries the flour home*,\n2. and the baker asks for her there.\n\n"
        '```python\nhome = {"Mara": "mill", "Oren": "harbour"}\n```'
    },
    "What is 17 + 5?": {"reasoning": REASONING, "content": "17 + 5 = **22**"},
}
CHINESE: dict[str, dict[str, str]] = {
    "小林住在哪里？你怎么知道的？": {
        "content": "小林住在**磨坊**。 故事里提到了两次：\n\n1. 她把面粉*带回家*；\n2. 面包师到那里去找她。"
    },
    "17 + 5 等于几？": {"reasoning": "十七加五， 就是 二十二。", "content": "17 + 5 = **22**"},
}
COMPARED: dict[str, dict[str, str]] = {
    "Will it rain in Shanghai?": {"call": TOOL_ARGUMENTS},
    "Say hello to the harbour.": {"content": "Hello, harbour! The boats are in, and the lamp is lit."},
    "poet: Say hello to the harbour.": {
        "content": "*Harbour, hello!*  \nThe tide is low,  \nthe lamps are lit,  \nthe gulls all know."
    },
}


@pytest.mark.slow
def test_screenshots(open_page: Callable[..., Any], server: PageServer, tmp_path: Path) -> None:
    """The pictures of the documentation; without GROUNDUP_SCREENSHOTS they show only that they can be drawn."""
    wanted = os.environ.get("GROUNDUP_SCREENSHOTS")
    folder = Path(wanted or tmp_path)
    server.scripts, server.pace = ENGLISH | CHINESE | COMPARED, 0.04 if wanted else 0.0

    def talk(page: Any, questions: Iterable[str], name: str, again: str = "Regenerate") -> None:
        for question in questions:
            say(page, question)
            expect(page.get_by_test_id("stText").last).to_have_text(question)
            expect(page.get_by_role("button", name=again)).to_be_visible()
        path = folder / f"chat-page-{name}.png"
        page.screenshot(path=path, animations="disabled")
        assert 5_000 < path.stat().st_size < 150_000

    talk(open_page(), ENGLISH, "en")
    talk(open_page(locale="zh-CN"), CHINESE, "zh", again="重新生成")
    page = open_page()
    page.get_by_test_id("stSidebar").get_by_role("radio", name="2").click()
    choose(page, "Model 2", "poet")
    talk(page, list(COMPARED)[:2], "side-by-side")
    talk(open_page(width=390, height=700), ENGLISH, "phone")


@pytest.mark.slow
def test_a_model_of_ours_end_to_end(open_page: Callable[..., Any], folder: Path) -> None:
    """`ui` starts the server on a folder; the page names the model, streams its answer and stops with the server."""
    command = Command(folder)
    try:
        page = open_page(command.address)
        page.get_by_text("Sampling").click()
        page.get_by_label("Max tokens").fill("8")
        say(page, "小猫")
        expect(page.get_by_text(re.compile("8 tokens"))).to_be_visible()
        expect(page.get_by_text("Cut off at the token limit")).to_be_visible()
    finally:
        assert command.stop() == 0
