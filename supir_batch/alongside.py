"""Work in a thread for as long as something else lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def alongside(work: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Do ``work`` in a thread of this name while the body runs, and wait for it to end.

    It gets an event that is set when the body is over, upon which it has to return.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
