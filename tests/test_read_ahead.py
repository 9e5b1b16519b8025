"""A stream that is read ahead is the stream."""

import threading

import pytest
import torch

from diffad.read_ahead import read_ahead


def test_items_come_in_their_order_and_an_error_in_its_place():
    def items():
        yield from range(3)
        raise ValueError("the fourth")

    stream = read_ahead(items())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(stream)
    assert list(read_ahead(iter([]))) == []


def test_the_next_item_is_made_while_the_last_is_worked_on():
    made = [threading.Event() for _ in range(3)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    stream = read_ahead(items())
    assert next(stream) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()  # one more, and no more


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_as_the_caller_has_them(enabled):
    with torch.set_grad_enabled(enabled):
        assert list(read_ahead(torch.is_grad_enabled() for _ in range(2))) == [enabled] * 2


def test_so_is_autocast():
    def products():
        yield torch.ones(2, 2) @ torch.ones(2, 2)

    with torch.autocast("cpu", torch.bfloat16):
        assert [product.dtype for product in read_ahead(products())] == [torch.bfloat16]
    assert [product.dtype for product in read_ahead(products())] == [torch.float32]
