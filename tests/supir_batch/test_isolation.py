"""Whose fault a worker's death was: the book by itself, and guards whose processes really die."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supir_batch.isolation import MAX_DEATHS, Begun, Book, Guard, Item, Worker, notes_folder, remove_notes

RUN = f"20260101T000000Z-test{os.getpid()}"
A, B, C = ("a", 0), ("b", 0), ("c", 3)


class Kept:
    """A ledger whose book is in this process, for a worker of this machine."""

    def __init__(self, book: Book) -> None:
        self.book = book

    def begin(self, stage: str, items: Sequence[Item]) -> Begun:
        return self.book.begin(stage, items, Worker("here", os.getpid()))

    def end(self, stage: str, items: Sequence[Item]) -> None:
        self.book.end(stage, items)


@pytest.fixture
def book() -> Book:
    return Book(is_lost=lambda node: node == "lost")


def test_what_ends_in_order_is_begun_together_and_leaves_no_mark(book: Book) -> None:
    worker = Worker("here", 1)
    assert book.begin("decode", [A, B], worker) == Begun(True, False, ((), ()))
    book.end("decode", [A, B])
    assert book.begin("write", [A], worker) == Begun(True, False, ((),))
    assert book.begin("decode", [A, C], worker) == Begun(True, True, ((), ()))


def test_what_died_in_company_is_tried_alone_and_twice_at_most(book: Book) -> None:
    first, second = Worker("here", 1), Worker("here", 2)
    book.begin("decode", [A, B], first)
    assert book.begin("decode", [A, B], second) == Begun(False, True, ((first,), (first,)), lost=2)
    assert book.begin("decode", [A], second).opened
    book.end("decode", [A])
    assert book.begin("decode", [B], second).opened
    assert book.begin("decode", [A, B], first) == Begun(False, True, ((first,), (first, second)), lost=1)
    assert not book.begin("decode", [B], first).opened
    assert book.begin("restore", [B], first).opened, "a stage says nothing about another"


def test_a_lost_node_is_nobodys_fault(book: Book) -> None:
    book.begin("restore", [A], Worker("lost", 1))
    assert book.begin("restore", [A], Worker("here", 2)) == Begun(True, True, ((),), lost=1)


def test_an_image_that_came_to_its_end_is_forgotten(book: Book) -> None:
    book.begin("write", [A], Worker("here", 1))
    book.retire("a")
    book.end("write", [A])
    assert book.begin("write", [A], Worker("here", 2)) == Begun(True, False, ((),))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_an_item_is_never_tried_after_its_second_death(steps: list[tuple[int, bool]]) -> None:
    """Random batches, random deaths: whatever happens, an item that is opened has died less than twice."""
    book, died = Book(is_lost=lambda node: False), dict.fromkeys(range(4), 0)
    for size, dies in steps:
        items = [(str(i), 0) for i in range(size + 1)]
        begun = book.begin("s", items, Worker("here", 1))
        groups = [items] if begun.opened else [[item] for item in items]
        for group in groups:
            opened = begun.opened or book.begin("s", group, Worker("here", 1)).opened
            assert opened == (max(died[int(name)] for name, _ in group) < MAX_DEATHS)
            if opened and dies:
                for name, _ in group:
                    died[int(name)] += 1
                break
            book.end("s", group)


def _segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _abort() -> None:
    os.abort()


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        pass


def _child(run_id: str, native: Callable[[], None]) -> None:
    with Guard("decode", Kept(Book(lambda node: False)), run_id, 0.5) as guard:
        for _ in guard.groups([A]):
            with guard.deadline():
                native()


@pytest.mark.parametrize(
    ("native", "kind", "words"),
    [
        (_segfault, "poison", "SIGSEGV"),
        (_abort, "poison", "SIGABRT"),
        (_killed, "poison", "SIGKILL"),
        (_hangs, "hang", "did not end within 0.5 s"),
    ],
)
def test_the_cause_of_two_deaths_is_named(book: Book, native: Callable[[], None], kind: str, words: str) -> None:
    for _ in range(MAX_DEATHS):
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(RUN, native))
        process.start()
        process.join(60)
        assert process.exitcode not in (0, None)
        assert book.begin("decode", [A], Worker("here", process.pid or 0)).opened
    try:
        with Guard("decode", Kept(book), RUN, 0.5) as guard:
            (group,) = guard.groups([A])
    finally:
        remove_notes(RUN)
    assert group.refused is not None
    assert group.refused.kind == kind
    assert words in str(group.refused)
    assert "supir-batch retry" in str(group.refused)


def test_a_guard_leaves_nothing_behind(book: Book) -> None:
    with Guard("decode", Kept(book), RUN, 60) as guard:
        groups = list(guard.groups([A, B]))
        with guard.deadline(2):
            assert list(notes_folder(RUN).iterdir())
    assert [group.members for group in groups] == [(0, 1)]
    assert not list(notes_folder(RUN).iterdir())
    remove_notes(RUN)
    assert not notes_folder(RUN).exists()
