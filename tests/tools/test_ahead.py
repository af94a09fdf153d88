from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from samq.errors import BadInput
from samq.tools.ahead import Ahead


def test_items_keep_their_order() -> None:
    assert list(Ahead(iter(range(5)))) == list(range(5))
    assert list(Ahead(iter([]))) == []


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    for item in Ahead(items()):
        if item == 1:
            assert second.wait(timeout=60)


def test_what_making_an_item_raises_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise BadInput("photo.jpg: cannot be read")

    ahead = iter(Ahead(items()))
    assert next(ahead) == 1
    with pytest.raises(BadInput, match="photo"):
        next(ahead)


def test_who_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    iterator = iter(Ahead(iter(range(5))))
    assert next(iterator) == 0
    iterator.close()
    assert threading.active_count() == before


def test_time_spent_waiting_is_told() -> None:
    ready = threading.Event()

    def items() -> Iterator[int]:
        threading.Timer(0.1, ready.set).start()
        ready.wait(timeout=60)
        yield 1

    ahead = Ahead(items())
    assert list(ahead) == [1]
    assert ahead.waited > 0.05
