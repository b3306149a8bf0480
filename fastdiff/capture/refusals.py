# SPDX-License-Identifier: Apache-2.0
"""Refusals of captures: each names the rule that the network broke."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from ..engine.loops import Written
from .weights import Weights


class CaptureRefused(RuntimeError):
    """A network cannot be captured; the message names the rule that it broke."""


class CaptureTooLarge(ValueError):
    """A capture alone is larger than `Graph.bytes`."""


# Errors that already say what is wrong.
_OWN = (CaptureRefused, Written)

# Relative difference between a body and its replay above which the replay is another computation.
# Below it lie networks whose kernels add in no fixed order.
_SAME = 2e-2


_REPLACED = "the same, but the network has replaced tensors that it keeps"


def compare(expected: torch.Tensor, got: torch.Tensor, weights: Weights) -> None:
    """Raises where a replay is another computation than the network's."""
    problem = difference(expected, got)
    if problem is None and weights.moved():
        problem = _REPLACED
    if problem is not None:
        raise _depends(problem)


def compare_poisoned(expected: torch.Tensor, got: torch.Tensor) -> None:
    """Raises where a run depends on what the network has replaced, which held NaN before it."""
    if difference(expected, got) is not None:
        raise _depends(_REPLACED)


def _depends(problem: str) -> CaptureRefused:
    return CaptureRefused(
        "sample: a captured network depends on its tensors alone; compared with the network "
        f"called on the same inputs, the replay gives {problem}. Does it count calls, branch "
        "on Python values that change, or make its buffers anew? Make these inputs (cond=), or "
        "use graph=None."
    )


def difference(expected: torch.Tensor, got: torch.Tensor) -> str | None:
    """How a replay's result differs from the one expected, or None. Waits for the device."""
    expected, got = expected.double(), got.double()
    both = torch.isfinite(expected) & torch.isfinite(got)
    if bool((torch.isfinite(expected) != torch.isfinite(got)).any()):
        return "other finite values"
    expected, got = expected[both], got[both]
    error = float((got - expected).norm())
    scale = float(expected.norm())
    if error <= _SAME * scale or error == 0.0:
        return None
    return f"a result that differs by {error / scale if scale else error:.2g} (relative)"


# What PyTorch and CUDA say, and the rule that was broken. First match.
_RULES = (
    (
        ("synchroniz", "cannot copy between cpu and cuda", "pageable", "unpinned"),
        "a captured network neither waits for the device nor copies from or to it",
        "Look for .item(), .cpu(), float(tensor), `if tensor`, print, and tensors made on the CPU "
        "(torch.tensor(...).to(device)); keep such values on the device or in buffers",
    ),
    (
        ("legacy stream", "wrong thread", "capturing stream", "isolat"),
        "a captured network launches on the current stream alone",
        "Look for streams and threads of its own, for kernels launched without a stream, and where "
        "a gradient is captured for another loss of the same parameters that is alive: PyTorch has "
        "them on the stream of that loss",
    ),
    (
        ("operation not permitted when stream is capturing", "streamcapture", "capture"),
        "a captured network neither waits for the device nor allocates with the driver",
        "Look for .item(), pinned or unmanaged memory, and libraries that initialise at first use",
    ),
)


def refusal(error: RuntimeError) -> RuntimeError:
    """The refusal that explains an error met in a capture; an error of another kind as it is."""
    # where ending a capture fails too, its error stands before the one that broke it
    first: BaseException = error
    while first.__context__ is not None and not isinstance(first, _OWN):
        first = first.__context__
    if not isinstance(first, RuntimeError):
        return error
    if isinstance(first, (NotImplementedError, *_OWN)):
        return first
    text = str(first).lower()
    for words, rule, hint in _RULES:
        if any(word in text for word in words):
            said = str(first).strip().split("\n")[0]
            return CaptureRefused(
                f"sample: {rule}; got: {said}{_culprit(first)}. {hint}; or sample with graph=None."
            )
    return error


def _culprit(error: BaseException) -> str:
    """The deepest line outside PyTorch and fastdiff in an error's traceback."""
    own = (torch.__file__.rsplit("__init__", 1)[0], str(Path(__file__).parent.parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" (at {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"
