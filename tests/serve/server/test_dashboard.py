"""The dashboard: its events, and the page in a real browser, where there is one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import expect, sync_playwright

from dvi_jax.serve.dashboard import history, page, point
from dvi_jax.serve.monitor import Sample
from dvi_jax.serve.requests import EngineStatus

expect.set_options(timeout=60_000)
CHROMIUM = shutil.which("chromium")
# Without a screen, and without asking anybody on the network for anything.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
BODY = {"prompt": "hello", "max_tokens": 20, "temperature": 0}


def test_points_are_what_happened_between_samples():
    status = EngineStatus(4, 1, 2, 512, "chain:2")
    first = Sample(100.0, replace(status, new_tokens=50, rounds=20, judged=(10, 4), accepted=(5, 1)))
    last = Sample(110.0, replace(status, new_tokens=110, rounds=50, judged=(30, 14), accepted=(20, 6)))
    assert point(first, last) == {
        "time": 110.0,
        "running": 1,
        "waiting": 2,
        "tokens_per_second": 6.0,
        "tokens_per_round": 2.0,
        "accept_rate": 20 / 30,
    }
    idle = point(last, replace(last, time=115.0))
    assert (idle["tokens_per_second"], idle["tokens_per_round"], idle["accept_rate"]) == (0.0, None, None)
    samples = [Sample(float(i), replace(status, new_tokens=7 * i)) for i in range(12)]
    assert [(p["time"], p["tokens_per_second"]) for p in history(samples)] == [(6.0, 7.0), (11.0, 7.0)]


def test_events(served):
    served.http.post("/v1/completions", json=BODY)
    with served.http.stream("GET", "/dashboard/events") as answer:
        lines = (line for line in answer.iter_lines() if line)
        first, second = (json.loads(next(lines).removeprefix("data: ")) for _ in range(2))
    assert set(first) == {"history"}
    assert second["engine"]["new_tokens"] == served.engine.counts.new_tokens
    assert {"time", "tokens_per_second"} < set(second["point"])


def test_the_page_loads_nothing_from_elsewhere(served):
    answer = served.http.get("/dashboard")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    text = page().decode()
    assert "src=" not in text
    assert "href=" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield browser
        browser.close()


@pytest.mark.browser
def test_the_page_is_live(served, browser):
    problems, hosts, began = [], set(), time.time() - 3600
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light") as context:
        view = context.new_page()
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        view.goto(f"{served.live.url}/dashboard")
        expect(view.locator("#state")).to_have_text("serving")
        assert view.inner_text("#plan") == "plan chain:3"
        assert view.is_hidden("#learning")
        served.http.post("/v1/completions", json=BODY)
        expect(view.locator("#total")).to_have_text(f"{served.engine.counts.new_tokens:,} since the start")
        expect(view.locator("#speeds .curve")).not_to_have_count(0)
        assert view.inner_text("#positions tr:first-child td:last-child") == "100.0%"
        assert view.inner_text("#positions tr:last-child td:last-child") == "0.0%"

        served.live.serving.sections["learning"] = learning = lambda: {"updates": 7, "live_since": began}
        expect(view.locator("#learned")).to_have_text("updates7live since60 min ago")
        served.live.serving.sections["learning"] = lambda: learning() | {"updates": 8}
        expect(view.locator("#rounds .update")).to_have_count(1)
        del served.live.serving.sections["learning"]
    assert problems == []
    assert hosts == {served.live.url.removeprefix("http://")}


@pytest.mark.browser
def test_on_a_phone_and_in_the_dark(served, browser):
    shades = {}
    for scheme in ("light", "dark"):
        with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme) as context:
            view = context.new_page()
            view.goto(f"{served.live.url}/dashboard")
            expect(view.locator("#state")).to_have_text("serving")
            assert view.evaluate("document.documentElement.scrollWidth") == 360
            text, ground = view.evaluate(
                "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
            )
            shades[scheme] = [sum(map(int, shade[4:-1].split(","))) for shade in (text, ground)]
    assert shades["light"][0] < shades["light"][1]
    assert shades["dark"][0] > shades["dark"][1]
    served.idle()
