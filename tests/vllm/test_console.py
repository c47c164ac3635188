"""The console in a real browser, over a real server: by keyboard, in light and dark.

MEMOIR_SCREENSHOTS=DIR keeps pictures of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Server
from test_server_admin import ANSWER, NEW, QUESTIONS, TARGETS, TOKEN, folder, server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

__all__ = ["folder", "server"]  # the fixtures of the admin API

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    urls: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(f"{server.http.base_url}/memoir/")
    yield page
    context.close()
    assert not [url for url in urls if not url.startswith((str(server.http.base_url), "data:"))]
    assert not [text for text in complaints if "401" not in text and "409" not in text]


def picture(page: Any, name: str) -> None:
    if wanted := os.environ.get("MEMOIR_SCREENSHOTS"):
        page.screenshot(path=f"{wanted}/{name}.png", full_page=False)


def sign_in(page: Any) -> None:
    page.locator("#token:focus").wait_for()  # without a click
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.locator("#work").wait_for(state="visible")


def scheme(page: Any) -> str:
    return "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"


def test_a_wrong_token_is_refused_and_the_right_one_is_forgotten_on_reload(page: Any) -> None:
    page.locator("#token:focus").wait_for()
    page.keyboard.type("not the token at all")
    page.keyboard.press("Enter")
    page.locator("#enter-error:has-text('admin token')").wait_for()
    page.locator("#token").fill("")
    page.locator("#token").focus()
    sign_in(page)
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.reload()
    assert page.locator("#work").is_hidden()


def test_a_prompt_is_answered_side_by_side(page: Any) -> None:
    sign_in(page)
    page.locator("#prompt:focus").wait_for()  # signing in moves the focus there
    page.keyboard.type(QUESTIONS[0])
    page.keyboard.press("Control+Enter")
    page.locator("#answers").wait_for(state="visible")
    base, edited = page.locator("#base").inner_text(), page.locator("#edited").inner_text()
    assert TARGETS[0] in edited and TARGETS[0] not in base
    assert page.locator("#decision").inner_text().startswith("Edit 0 answered")
    first = page.locator("#nearest .bar").first
    assert "matches" in first.get_attribute("aria-label")
    fill, bar = first.locator(".fill").bounding_box(), first.bounding_box()
    mark = first.locator(".tau").bounding_box()
    assert fill["width"] / bar["width"] > (mark["x"] - bar["x"]) / bar["width"] > 0.3
    dark = scheme(page) == "dark"
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(", "))) < 200) == dark
    page.locator("#recent tr").first.wait_for()
    picture(page, f"console-{scheme(page)}")


def halfway(route: Any) -> None:
    """One answer about a job as it would be in the middle of training, however fast this machine trains."""
    reply = route.fetch()
    progress = {"stage": "training", "step": 3, "limit": 60, "loss": 0.5, "goal": 0.02}
    route.fulfill(response=reply, json=reply.json() | {"state": "running", "finished": None, "progress": progress})


def test_an_edit_is_added_found_and_removed_by_keyboard(page: Any) -> None:
    sign_in(page)
    page.locator("#adding summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type(NEW)
    page.keyboard.press("Tab")
    page.keyboard.type(ANSWER)
    page.keyboard.press("Tab")
    page.keyboard.type("ticket 4")
    page.route("**/memoir/jobs/*", halfway, times=1)
    page.keyboard.press("Enter")
    page.locator("#change:has-text('training, step 3 of at most 60, loss 0.500 (done below 0.02)')").wait_for()
    page.locator("#change:has-text('is served')").wait_for(timeout=120_000)
    page.locator("#words").fill("moon gate")
    page.locator("#words").press("Enter")
    page.locator("#page:has-text('1 to 1 of 1')").wait_for()
    row = page.locator("#edits tr").inner_text()
    assert ANSWER in row and "source: ticket 4" in row
    page.locator("#edits button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#confirm").is_visible()
    assert page.evaluate("document.activeElement.value") == "no", "the harmless answer has the focus"
    page.keyboard.press("Escape")
    assert page.locator("#edits tr").count() == 1
    page.evaluate("document.querySelector('#edits button').id = 'old'")
    page.evaluate("document.querySelector('#search').requestSubmit()")  # the list is drawn anew
    page.locator("#edits button:not(#old)").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Remove", "the button keeps the focus"
    page.keyboard.press("Enter")
    page.locator("#confirm").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#change:has-text('Removing')").wait_for()
    page.locator("#page:has-text('no edits')").wait_for()
    assert page.evaluate("document.activeElement.id") == "words"
    assert page.locator("#no-audit").is_hidden()
    assert "remove" in page.locator("#audit").inner_text()
