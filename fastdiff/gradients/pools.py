# SPDX-License-Identifier: Apache-2.0
"""Where forward and backward passes get their runs, and what is worked out once for many of them.

A pass borrows a `Run` for as long as it lasts, so passes at the same time, in other threads or
inside one another never share one. A captured pair of graphs keeps runs of its own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .. import backends
from ..engine.leases import Leases
from ..engine.run import Run, Spec, features_of
from ..plans import AT_E, WRITES_E, WRITES_M, Layout, PackedRow

_KEPT = 16  # adjoint plans and tables


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a backward pass. A run holds one table or another by identity.

    Attributes:
        rows: The rows, with one weight a branch.
        layout: Of their table.
        slots: History registers that they use.
        entries: Entries of the bank that they may name.
    """

    rows: tuple[PackedRow, ...]
    layout: Layout
    slots: int
    entries: int = 0

    def spec(self, x: torch.Tensor, backend: str | None) -> Spec:
        """The spec of a run of these rows on a state like x.

        Args:
            x: The state.
            backend: A backend's name; None: the fastest that can serve.
        """
        serving = backends.choose(
            *(backend, x.dtype, x.dtype, x.device, self.layout),
            noisy=any(row.draws for row in self.rows),
            elements=x.numel(),
        )
        any_flag = 0
        for row in self.rows:
            any_flag |= row.flags
        return Spec(
            shape=x.shape,
            device=x.device,
            state=x.dtype,
            network=x.dtype,
            backend=serving.name,
            layout=self.layout,
            rows=len(self.rows),
            slots=self.slots,
            has_e=bool(any_flag & (AT_E | WRITES_E)),
            has_m=bool(any_flag & WRITES_M),
            entries=self.entries,
            bank_batch=x.shape[0] if self.entries else 0,
            features=features_of(self.rows),
        )


class _Holdings:
    """Which table stands in which run, so that rows are packed where they changed alone."""

    def __init__(self) -> None:
        self._tables: weakref.WeakKeyDictionary[Run, Table] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def put(self, table: Table, run: Run) -> None:
        """Writes a table into a run that the caller has borrowed."""
        with self._lock:
            held = self._tables.get(run)
        if held is table:
            return
        run.write(table.rows)
        with self._lock:
            self._tables[run] = table


class Recent:
    """The values of the last few keys, each made once. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: list[tuple[Any, Any, Any]] = []  # (object, key, value), the latest last

    def get(self, of: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The value for an object and a key.

        Args:
            of: The object, told apart by identity and kept alive.
            key: Whatever else the value depends on, compared by equality.
            make: Makes it.
        """
        with self._lock:
            for place, (held, held_key, value) in enumerate(self._values):
                if held is of and held_key == key:
                    self._values.append(self._values.pop(place))
                    return value
        value = make()
        with self._lock:
            self._values.append((of, key, value))
            del self._values[:-_KEPT]
        return value

    def clear(self) -> None:
        """Forgets all of them."""
        with self._lock:
            self._values.clear()


class Lender(Protocol):
    """Lends runs, each to one borrower at a time."""

    def run(self, spec: Spec) -> AbstractContextManager[Run]:
        """A forward run of this spec."""
        ...

    def backward_run(self, table: Table, spec: Spec) -> AbstractContextManager[Run]:
        """A run of this spec with the table's rows in it."""
        ...


@dataclass(frozen=True)
class Pools:
    """What a sampler's differentiable calls share: idle runs, adjoint plans and tables.

    Attributes:
        forward: Runs of the plan.
        backward: Runs of backward tables.
        recent: What is worked out from a plan: the adjoint's own plan, packed tables.
    """

    forward: Leases
    backward: Leases = field(default_factory=Leases)
    recent: Recent = field(default_factory=Recent)
    holdings: _Holdings = field(default_factory=_Holdings)

    def run(self, spec: Spec) -> AbstractContextManager[Run]:
        """See `Lender.run`."""
        return self.forward.borrowed(spec)

    @contextlib.contextmanager
    def backward_run(self, table: Table, spec: Spec) -> Iterator[Run]:
        """See `Lender.backward_run`."""
        with self.backward.borrowed(spec) as run:
            self.holdings.put(table, run)
            yield run

    def clear(self) -> None:
        """Gives up everything that is idle."""
        self.forward.clear()
        self.backward.clear()
        self.recent.clear()


class OwnRuns:
    """Runs that a captured pair of graphs keeps: a graph knows their addresses.

    Attributes:
        runs: All of them.
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._idle: dict[Spec, list[Run]] = {}
        self._holdings = _Holdings()

    @contextlib.contextmanager
    def run(self, spec: Spec) -> Iterator[Run]:
        """See `Lender.run`."""
        idle = self._idle.setdefault(spec, [])
        if not idle:
            idle.append(Run(spec))
            self.runs.append(idle[-1])
        run = idle.pop()
        try:
            yield run
        finally:
            idle.append(run)

    @contextlib.contextmanager
    def backward_run(self, table: Table, spec: Spec) -> Iterator[Run]:
        """See `Lender.backward_run`."""
        with self.run(spec) as run:
            self._holdings.put(table, run)
            yield run
