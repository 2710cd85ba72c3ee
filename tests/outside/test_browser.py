"""The candidate's page in Chromium, against a real server."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from harness import Demo, Server, Session, free_port, need, rss_kib
from waiting import wait_until

SHOTS = os.environ.get("CARREL_SCREENSHOTS")
"""A directory for pictures of the page; none are kept without it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to work as root.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=need("chromium"), args=options)
        yield browser
        browser.close()


class Tab:
    """One tab with a session's page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self.problems.append(message.text) if "Content Security Policy" in message.text else None)

    def wait(self, state: str, within: float = 30) -> None:
        """For the badge."""
        expect(self.page.locator("body")).to_have_attribute("data-state", state, timeout=within * 1000)

    def screen(self) -> str:
        """What the terminal shows, line by line."""
        rows = self.page.locator(".xterm-rows > div").all_inner_texts()
        return "\n".join(row.replace("\xa0", " ").rstrip() for row in rows).rstrip()

    def shows(self, pattern: str, within: float = 20) -> str:
        """Waits for a regular expression on the screen."""
        found = re.compile(pattern, re.MULTILINE)
        try:
            wait_until(pattern, lambda: found.search(self.screen()), within, every=0.1)
        except AssertionError:
            raise AssertionError(f"{pattern!r} was not shown within {within} s:\n{self.screen()}") from None
        return found.search(self.screen())[0]  # type: ignore[index]

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)

    def enter(self, command: str) -> None:
        self.page.keyboard.type(command + "\n")

    def paste(self, text: str) -> None:
        """As the browser does it: an event at the terminal's input."""
        self.page.evaluate(
            """text => {
                const data = new DataTransfer();
                data.setData('text/plain', text);
                const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
                document.querySelector('.xterm-helper-textarea').dispatchEvent(event);
            }""",
            text,
        )

    def heading(self, within: float = 30) -> str:
        """Of the card that covers the terminal."""
        card = self.page.locator("#card h1")
        expect(card).to_be_visible(timeout=within * 1000)
        return card.inner_text()

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}.png")


@contextmanager
def tab(browser: Browser, url: str, size: tuple[int, int] = (1000, 620)) -> Iterator[Tab]:
    """A tab of a browser that knows nothing yet."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    try:
        opened = Tab(context.new_page())
        opened.page.goto(url)
        yield opened
        assert not opened.problems, opened.problems
    finally:
        context.close()


def link(session: Session, base: str | None = None) -> str:
    return f"{base or session.http_base}/session/{session.id}#ticket={session.ticket()}"


@contextmanager
def connected(browser: Browser, session: Session, **kwargs: Any) -> Iterator[Tab]:
    with tab(browser, link(session), **kwargs) as opened:
        opened.wait("connected")
        opened.shows(r"[$#] ?$")
        yield opened


class Cable:
    """A TCP connection between browser and server that can be cut, cut silently, and mended."""

    def __init__(self, port: int, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", port))
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.whole = threading.Event()
        self.whole.set()
        self.over = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.over:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if not self.whole.is_set():
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.whole.clear()
        for pair in self.pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self.pairs.clear()

    def mend(self) -> None:
        self.whole.set()

    def close(self) -> None:
        self.over = True
        self.listener.close()
        self.cut()


# --- getting in --------------------------------------------------------------------------------------------------


@pytest.mark.local("`carrel demo` is about this machine")
def test_the_demos_address_leads_into_the_shell_and_its_ticket_leaves_the_address(browser: Browser, demo: Demo) -> None:
    with tab(browser, demo.data["browser_url"]) as page:
        page.wait("connected")
        assert "ticket" not in page.page.url
        assert page.page.evaluate("history.length") <= 2
        page.enter("echo in-$((40+2))")
        page.shows("^in-42")
        page.shot("shell")
        [cookie] = page.page.context.cookies(f"{demo.url}/v1/sessions/{demo.session_id}/terminal")
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        assert demo.session_id in cookie["path"]
        assert page.page.context.cookies(f"{demo.url}/v1/sessions") == []


def test_a_used_link_explains_itself(browser: Browser, fresh: Session) -> None:
    url = link(fresh)
    with tab(browser, url) as page:
        page.wait("connected")
    with tab(browser, url) as page:
        assert "used" in page.heading()
        page.shot("used-link")


def test_a_page_without_a_ticket_shows_nothing_of_a_session(browser: Browser, session: Session) -> None:
    with tab(browser, f"{session.http_base}/session/{session.id}") as page:
        assert page.heading()
        assert page.screen() == ""


def test_the_page_is_sent_with_a_strict_policy(session: Session) -> None:
    answer = session.server.client.get(f"/session/{session.id}")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in re.sub(r"style-src-attr 'unsafe-inline'", "", policy)
    assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "") and "https:" not in answer.text
    for asset in re.findall(r'"(/assets/[^"]+)"', answer.text):
        got = session.server.client.get(asset)
        assert got.status_code == 200 and "immutable" in got.headers["cache-control"]
    assert session.server.client.get("/assets/nothing.js").status_code == 404


# --- work --------------------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_typing_colours_and_wide_characters(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        # Without the prompt of an image, which may set the title as well.
        page.enter("PS1='$ '; printf '\\e[38;2;255;120;50mtrue\\e[0m \\e[1;32mbold\\e[0m ünï 😀 €\\n'; printf '\\e]0;a title\\a'")
        page.shows("^true bold ünï 😀 €")
        expect(page.page).to_have_title(re.compile("a title"))
        colour = page.page.locator(".xterm-rows span", has_text="true").last.evaluate("span => getComputedStyle(span).color")
        assert colour == "rgb(255, 120, 50)"
        page.shot("colours")


@pytest.mark.pods
def test_vim_works_with_cursor_keys_and_keeps_its_screen_over_a_reload(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        editor = "vim" if fresh.ssh.run("command -v vim").returncode == 0 else "vi"
        page.enter(f"cd /tmp && {editor} note.txt")
        page.shows("^~$")
        page.type("ifirst line")
        page.page.keyboard.press("Enter")
        page.type("second line")
        page.page.keyboard.press("Escape")
        page.page.keyboard.press("ArrowUp")
        page.type("x")
        page.shows("^first lin\nsecond line\n~")
        before = page.screen()
        page.shot("vim-before")
        page.page.reload()
        page.wait("connected")
        wait_until("the same screen after the reload", lambda: page.screen() == before, within=10)
        page.shot("vim-after")
        page.type("Gothird line")
        page.page.keyboard.press("Escape")
        page.type(":wq\n")
        page.shows(r"[$#] ?$")
        # Nothing but what was typed: no answer of the new terminal went into the editor.
        page.enter("clear; cat note.txt")
        page.shows(r"^first lin\nsecond line\nthird line\n.*[$#]$")


def test_the_terminal_follows_the_window(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        def size(mark: str) -> list[int]:
            page.enter(f"clear; sleep 0.4; echo {mark}-$(stty size)")
            return [int(number) for number in page.shows(rf"^{mark}-\d+ \d+$").split("-")[1].split()]

        rows, cols = size("first")
        page.page.set_viewport_size({"width": 700, "height": 400})
        less_rows, less_cols = size("second")
        assert less_rows < rows and less_cols < cols
        page.page.set_viewport_size({"width": 380, "height": 600})
        third = size("third")
        assert third[0] > less_rows and 30 < third[1] < less_cols
        page.shot("small")


def test_a_paste_of_a_megabyte_arrives_whole(browser: Browser, fresh: Session) -> None:
    text = "".join(f"{index:07d} {os.urandom(40).hex()} é\n" for index in range(11_500))
    with connected(browser, fresh) as page:
        # Without echo: the kernel mixes what is left of it with the output of the next program.
        page.enter("stty -echo; echo go-$((40+2)); cat > /tmp/paste; stty echo; clear; sha256sum < /tmp/paste")
        page.shows("^go-42")
        page.paste(text)
        page.page.keyboard.press("Control+d")
        assert page.shows("^[0-9a-f]{64}", within=60) == hashlib.sha256(text.encode()).hexdigest()


def test_an_endless_output_is_interrupted_at_once(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        before = rss_kib(fresh.server.pid)
        page.enter("yes 'all work and no play'")
        page.shows("(all work and no play\n){10}")
        page.page.wait_for_timeout(3000)
        assert rss_kib(fresh.server.pid) - before < 20_000
        started = time.monotonic()
        page.page.keyboard.press("Control+c")
        page.enter("clear; echo stopped-$((40+2))")
        page.shows("^stopped-42", within=10)
        assert time.monotonic() - started < 5


def test_copy_takes_what_is_selected(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.enter("clear; echo copy-me-please")
        page.shows("^copy-me-please")
        box = page.page.locator(".xterm-rows > div").first.bounding_box()
        assert box
        page.page.mouse.dblclick(box["x"] + 30, box["y"] + box["height"] / 2)
        page.page.keyboard.press("Control+Shift+C")
        assert page.page.evaluate("navigator.clipboard.readText()") == "copy-me-please"


def test_answers_of_the_terminal_are_not_typed_into_the_shell_by_a_reload(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        # Questions: cursor position, attributes, colours, name. Their answers are eaten here, and asked for no second time.
        page.enter("clear; stty -echo; printf '\\e[6n\\e[c\\e[>c\\e]11;?\\a\\e[>q'; read -rs -t 1 -N 500 answers; stty echo; echo asked")
        page.shows("^asked")
        page.page.reload()
        page.wait("connected")
        page.shows("^asked")
        page.enter("echo clean-$((40+2))")
        page.shows("^clean-42")
        assert "rgb:" not in page.screen() and ";" not in page.screen().split("asked", 1)[1].replace("$((40+2))", "")


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_a_cut_network_is_shown_and_the_terminal_comes_back(browser: Browser, new_server: Callable[..., Server]) -> None:
    port = free_port()
    server = new_server(options=["--allowed-origins", f"http://127.0.0.1:{port}"])
    session = server.create_session("plain")
    cable = Cable(port, server.http_port)
    try:
        with tab(browser, link(session, f"http://127.0.0.1:{port}")) as page:
            page.wait("connected")
            page.enter("marker=survived; for i in 1 2 3 4 5 6 7 8; do echo tick-$i; sleep 1; done")
            page.shows("^tick-2")
            cable.cut()
            page.wait("reconnecting", within=10)
            expect(page.page.locator("#notice-text")).to_contain_text("Trying again in", timeout=10_000)
            page.shot("reconnecting")
            cable.mend()
            page.wait("connected", within=30)
            page.shows("^tick-2")
            page.shows("^tick-8", within=20)
            page.enter("echo $marker-$((40+2))")
            page.shows("^survived-42")
    finally:
        cable.close()


def test_a_restart_of_the_server_is_survived(browser: Browser, new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session("plain")
    with tab(browser, link(session)) as page:
        page.wait("connected")
        page.enter("marker=survived; clear; echo ready")
        page.shows("^ready")
        server.stop()
        page.wait("reconnecting", within=10)
        server.start()
        page.wait("connected", within=40)
        page.enter("echo $marker-$((40+2))")
        page.shows("^survived-42")


@pytest.mark.pods
def test_a_session_that_starts_shows_its_steps(browser: Browser, server: Server) -> None:
    session = server.create_session("slow-start", ready=False)
    with tab(browser, link(session)) as page:
        page.wait("starting", within=10)
        steps = page.page.locator("#steps li")
        expect(steps).to_have_count(5)
        expect(page.page.locator("#steps li[aria-current=step]")).to_have_count(1)
        page.shot("starting")
        page.wait("connected", within=40)
        page.enter("echo in-$((40+2))")
        page.shows("^in-42")
    session.terminate()


@pytest.mark.pods
def test_the_end_by_staff_and_a_visit_after_it_say_why(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        fresh.terminate()
        assert "ended your session" in page.heading()
        page.shot("ended")
        expect(page.page.locator("#card")).to_contain_text("ended_by_staff")
        page.page.reload()
        assert "ended your session" in page.heading()


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_time_running_out_is_shown_and_only_ever_goes_down(browser: Browser, server: Server) -> None:
    session = server.create_session("minute")
    with tab(browser, link(session)) as page:
        page.wait("connected")
        seen = [60]
        deadline = time.monotonic() + 75
        while time.monotonic() < deadline and page.page.locator("#card").is_hidden():
            shown = page.page.locator("#time-left").inner_text()
            if shown:
                minutes, seconds = map(int, shown.split(":"))
                seen.append(60 * minutes + seconds)
            page.page.wait_for_timeout(400)
            if seen[-1] == 30:
                page.shot("last-minute")
        assert seen == sorted(seen, reverse=True), seen
        assert page.heading() == "Time is up"
        page.shot("time-is-up")
        expect(page.page.locator("#card")).to_contain_text("time_expired")


def test_an_ended_shell_offers_a_new_one(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        page.enter("exit 3")
        assert "shell has ended" in page.heading()
        expect(page.page.locator("#card")).to_contain_text("code 3")
        page.shot("shell-ended")
        page.page.get_by_role("button", name="Open a new shell").press("Enter")
        page.wait("connected")
        page.enter("clear; echo again-$((40+2))")
        page.shows("^again-42")


def test_the_page_can_be_used_without_a_mouse(browser: Browser, fresh: Session) -> None:
    with connected(browser, fresh) as page:
        page.page.keyboard.press("Control+Shift+F6")
        expect(page.page.locator("#menu summary")).to_be_focused()
        page.page.keyboard.press("Enter")
        expect(page.page.get_by_label("Larger text")).to_be_visible()
        page.shot("menu")
        page.page.keyboard.press("Tab")
        page.page.keyboard.press("Tab")
        expect(page.page.get_by_label("Larger text")).to_be_focused()
        page.page.keyboard.press("Escape")
        page.enter("clear; echo back-$((40+2))")
        page.shows("^back-42")
