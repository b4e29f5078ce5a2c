"""The server's page, in a real browser."""

import threading

import pytest

from fakes import wait_until
from served import Gated, serving


def text_of(window, name: str) -> str:
    return window.run("return document.getElementById(arguments[0]).textContent", name)


def test_a_drawing_is_answered_exit_by_exit_and_cut_off_at_the_deadline(window) -> None:
    network = Gated()
    with serving(network, shape=(1, 2, 2), most_s=60.0) as (service, port):
        window.go(f"http://127.0.0.1:{port}/")
        wait_until(lambda: window.run("return model !== null"))
        window.messages()
        window.run("id('send').click()")
        wait_until(lambda: "the last exit" in text_of(window, "said"))
        assert text_of(window, "said").startswith("Exit 2 of 2 after")
        shares = window.run(
            "return [...document.querySelectorAll('.bar i')]"
            ".map((bar) => parseFloat(bar.style.width))"
        )
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(100, abs=0.1)

        # while a stage is held still, the bars show the exit before it, and the dial cuts it off
        held = threading.Event()
        network.at[1] = lambda: held.wait(30)
        window.run("id('dial').value = 75; showDial(); id('send').click()")
        assert text_of(window, "shown") == "1000 ms"
        wait_until(lambda: "cut off by the deadline" in text_of(window, "said"))
        assert text_of(window, "said").startswith("Exit 0 of 2")
        held.set()
        network.at.clear()

        wait_until(lambda: text_of(window, "counts").startswith("2 requests, "))
        assert window.run("return document.querySelectorAll('#dots circle').length") == 2
        window.run("id('more').click(); id('more').click()")
        assert text_of(window, "load") == "16 requests per second"
        wait_until(lambda: len(service.recent) > 20)
        window.run("for (let n = 0; n < 9; n++) id('more').click(); pump = () => {}")
        assert text_of(window, "load") == "256 requests per second"
        window.run("id('less').click()")
        assert text_of(window, "load") == ""
        assert window.messages() == []


def test_only_this_machine_is_loaded_by_the_button(window) -> None:
    with serving(Gated(), shape=(1, 2, 2)) as (_service, port):
        # a name that Chromium, started so in tests/support/browser.py, takes for this machine
        window.go(f"http://elsewhere.test:{port}/")
        wait_until(lambda: window.run("return model !== null"))
        assert window.run("return id('loading').hidden")
        window.run("id('more').click()")
        assert text_of(window, "load") == ""


def test_the_page_fits_a_phone_can_be_used_by_keyboard_and_runs_nothing_else(window) -> None:
    with serving(Gated(), shape=(1, 2, 2)) as (_service, port):
        window.size(400)
        window.go(f"http://127.0.0.1:{port}/")
        wait_until(lambda: window.run("return model !== null"))
        assert window.run("return document.documentElement.scrollWidth") <= 400
        window.press("Tab", "Tab", "ArrowRight")
        assert window.run("return document.activeElement.id") == "draw"
        assert window.run("return place") == [15, 14]
        window.messages()
        window.run(
            "const script = document.createElement('script');"
            "script.textContent = 'window.bad = 1';"
            "document.body.append(script)"
        )
        assert window.run("return window.bad === undefined")


def test_numbers_can_be_typed_where_the_input_is_no_image(window) -> None:
    with serving(Gated()) as (_service, port):
        window.go(f"http://127.0.0.1:{port}/")
        wait_until(lambda: window.run("return model !== null"))
        assert window.run("return id('image').hidden && !id('numbers').hidden")
        window.run("id('values0').value = '1, 2, 3'; id('send').click()")
        wait_until(lambda: "expected 4 numbers" in text_of(window, "said"))
