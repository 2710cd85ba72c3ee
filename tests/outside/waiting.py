"""Waiting for what happens elsewhere, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Late(AssertionError):
    """Something did not happen within its deadline."""


def wait_until(what: str, probe: Callable[[], Any], within: float = 20, every: float = 0.05) -> Any:
    """Returns the first true value of `probe`; fails with `what` and the last value after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Late(f"not within {within} s: {what} (last seen: {value!r})")
        time.sleep(every)
