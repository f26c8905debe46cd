"""The web page at / in headless Chromium, over a real server with SmolLM2, driven by the keyboard.

The screenshots that it takes lie in the test's temporary folder; docs/ has copies of them.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import RunningServer, options, running_server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODEL = "smollm2-135m"
LIMIT_MS = 180_000
IS_DONE = "count => document.querySelectorAll('.figures').length == count"
HAS_TEXT = """length => {
    const text = [...document.querySelectorAll('.assistant')].at(-1)?.textContent ?? '';
    return text.length > length || (text && document.getElementById('stop').disabled);
}"""  # or the whole answer is there
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(MODEL, *options(max_model_len=1500, attention_backend="sdpa_vattn")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: RunningServer, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, loaded; its requests stay at the server, and no script of it fails."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 800}}))
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    urls: list[str] = []
    errors: list[Any] = []
    page.on("request", lambda sent: urls.append(sent.url))
    page.on("pageerror", lambda error: errors.append(error))  # playwright marks the function that it gets
    page.goto(server.url)
    page.wait_for_function("name => document.getElementById('model').textContent == name", arg=MODEL)
    yield page
    context.close()
    assert not errors and all(url.startswith(f"{server.url}/") for url in urls)


def say(page: Any, text: str) -> None:
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def stop(page: Any) -> None:
    """With the keyboard, from the text field; an answer that has ended stays as it is."""
    page.keyboard.press("Tab")
    if focused(page) == "stop":
        page.keyboard.press("Enter")
    page.locator("#text").focus()


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id")


def test_an_answer_streams_beside_memory_and_latencies(page: Any, tmp_path: Path) -> None:
    say(page, "What is the capital of France?")  # the text field has the focus from the start
    page.wait_for_function(HAS_TEXT, arg=0)
    page.wait_for_function("() => document.querySelectorAll('#pages .used').length")
    page.wait_for_function(HAS_TEXT, arg=200)
    stop(page)
    page.wait_for_function(IS_DONE, arg=1)
    say(page, "What else is there to see in France?")
    page.wait_for_function("() => document.querySelectorAll('.assistant').length == 2")
    page.wait_for_function(HAS_TEXT, arg=300)
    page.screenshot(path=tmp_path / "web_page.png")
    stop(page)
    page.wait_for_function(IS_DONE, arg=2)
    assert page.locator(".turn.user").count() == 2
    page.wait_for_function("() => document.getElementById('ttfts').getAttribute('points')?.includes(' ')")
    assert page.locator("#ttft").inner_text().endswith(" ms") and page.locator("#itl").inner_text().endswith(" ms")
    assert "rows used" in page.locator("#numbers").inner_text()
    assert page.locator(".figures").first.inner_text().split()[1] == "tokens,"


def test_the_keyboard_alone_stops_an_answer_and_clears_the_conversation(page: Any) -> None:
    say(page, "Write a very long story about a fox and a crow.")
    page.wait_for_function(HAS_TEXT, arg=0)
    page.keyboard.press("Tab")
    assert focused(page) == "stop"
    page.keyboard.press("Enter")
    page.wait_for_function(IS_DONE, arg=1)
    assert focused(page) == "text"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "clear"
    page.keyboard.press("Enter")
    assert page.locator("#talk").inner_text() == ""


def test_a_failed_request_is_shown_and_the_next_one_works(page: Any) -> None:
    page.locator("#text").fill("word " * 3000)
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.error')")
    assert "maximum context length is 1500 tokens" in page.locator(".error").inner_text()
    page.wait_for_function("() => !document.getElementById('send').disabled")
    say(page, "Say hello.")
    page.wait_for_function(HAS_TEXT, arg=0)


@pytest.mark.parametrize("page", [{"viewport": {"width": 390, "height": 844}, "has_touch": True}], indirect=True)
def test_a_phone_shows_it_without_a_horizontal_scroll(page: Any, tmp_path: Path) -> None:
    say(page, "What is the capital of France?")
    page.wait_for_function(HAS_TEXT, arg=100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("text", "send", "pages", "itls"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=tmp_path / "web_page_phone.png", full_page=True)
