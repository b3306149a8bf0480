# SPDX-License-Identifier: Apache-2.0
"""Operations that wait for a device are found in the thread that captures, and in no other."""

import threading

import pytest
import torch
from torch.nn import functional

from fastdiff.capture.waits import AVAILABLE, waits

X = torch.randn(4, 4)
MASK, ROWS, TIMES = X > 0, torch.tensor([0, 2]), torch.ones(4, dtype=torch.long)
M = torch.empty(4, 4, device="meta")  # stands for a device beside the host

WAITING = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "if": lambda: 1 if X.mean() > 0 else 0,
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "masked rows": lambda: X.clone().index_put_((MASK,), torch.ones(int(MASK.numpy().sum()))),
    "masked_select": lambda: torch.masked_select(X, MASK),
    "unique": lambda: torch.unique(X),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "inverse": lambda: torch.linalg.inv(X),
    "repeat": lambda: X.repeat_interleave(TIMES, 0),
    "one_hot": lambda: functional.one_hot(ROWS),
    "bincount": lambda: torch.bincount(ROWS),
}

NOT_WAITING = {
    "arithmetic": lambda: torch.tensor(2.0) * X.softmax(-1) @ X,
    "rows": lambda: X[ROWS],
    "one number by a mask": lambda: X.clone().index_put_((MASK,), torch.tensor(1.0)),
    "masked_fill": lambda: X.masked_fill(MASK, 1.0),
    "where of three": lambda: torch.where(MASK, X, 0.0),
    "repeat of known size": lambda: X.repeat_interleave(TIMES, 0, output_size=4),
    "repeat by a number": lambda: X.repeat_interleave(2, 0),
    "attention": lambda: functional.scaled_dot_product_attention(X[None], X[None], X[None]),
    "embedding": lambda: functional.embedding(ROWS, X),
    "inverse without a check": lambda: torch.linalg.inv_ex(X),
    "copy": lambda: X.clone().copy_(X.double()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("operation", WAITING)
def test_an_operation_that_waits_raises(operation, inference):
    with (
        torch.inference_mode(inference),
        waits("cpu"),
        pytest.raises(RuntimeError, match="a synchronizing operation, aten"),
    ):
        WAITING[operation]()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("operation", NOT_WAITING)
def test_an_operation_that_does_not_wait_gives_what_it_gives(operation, inference):
    expected = NOT_WAITING[operation]()
    with torch.inference_mode(inference), waits("cpu"):
        result = NOT_WAITING[operation]()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


COPIES = {
    "to the device": lambda: X.to("meta"),
    "into a tensor of the device": lambda: M.copy_(X),
    "to the host": lambda: M.cpu(),
    "into a tensor of the host": lambda: torch.empty(4, 4).copy_(M),
    "by an index": lambda: M[ROWS],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("copy", COPIES)
def test_copies_between_host_and_device_raise(copy, inference):
    with (
        torch.inference_mode(inference),
        waits("meta"),
        pytest.raises(RuntimeError, match="a synchronizing operation, aten"),
    ):
        COPIES[copy]()


def test_copies_on_one_side_and_asynchronous_ones_do_not(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    with waits("meta"):
        M.clone().copy_(M).to(torch.float16)
        X.clone().copy_(X).to(torch.float16)
        M * torch.tensor(2.0)
        X.sum().item()  # of the host
        M.copy_(X, non_blocking=True)
        X.to("meta", non_blocking=True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            M.copy_(X)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    with waits("meta"), pytest.raises(RuntimeError, match="synchronizing"):
        M.copy_(X, non_blocking=True)


def test_the_backward_pass_is_looked_at():
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = X.clone().requires_grad_()
    with waits("cpu"):
        y = Waiting.apply(x).sum()
        with pytest.raises(RuntimeError, match="synchronizing"):
            y.backward()


def test_other_threads_wait_as_they_like():
    found, begun, done = [], threading.Event(), threading.Event()

    def work():
        begun.wait(10)
        found.append(float(X.sum()))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with waits("cpu"):
        begun.set()
        assert done.wait(10)
    thread.join()
    assert found == [float(X.sum())]
    assert float(X.sum()) == found[0]  # the scope has ended


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch's modes break higher-order operators")
def test_operators_of_higher_order_pass():
    with waits("cpu"):
        result = torch.ops.higher_order.cond(MASK.any(), torch.sin, torch.cos, (X,))
    assert torch.equal(result, X.sin())
