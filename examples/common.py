# SPDX-License-Identifier: Apache-2.0
"""What the examples share: pictures, peak memory, and errors in one sentence."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff._files import replacing

# Colours that colour-blind readers tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


class Example(click.Command):
    """A command that answers a missing package with the sentence that says what to install."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError as error:
            raise click.ClickException(str(error)) from error


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG in one step, and makes the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format="png")


def show(panel: Any, rows: list[tuple[str, Tensor]], columns: list[str]) -> None:
    """Draws rows of images [C, 1, 8, 8], each with its name, as dark ink on white."""
    tiles = [F.pad(images[:, 0], (1, 1, 1, 1), value=-1.0) for _, images in rows]
    page = torch.cat([tile.transpose(0, 1).flatten(1) for tile in tiles])
    panel.imshow(page.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    panel.set_yticks([10 * i + 4.5 for i in range(len(rows))], [name for name, _ in rows])
    panel.set_xticks([10 * i + 4.5 for i in range(len(columns))], columns)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)


class Sheet:
    """Two plots side by side, `left` and `right`, above rows of images."""

    def __init__(self, height: float = 7.2, below: float = 1.05) -> None:
        self.figure: Any = Figure(figsize=(9, height), layout="constrained")
        top, self.bottom = self.figure.subfigures(2, 1, height_ratios=(1, below))
        self.left, self.right = top.subplots(1, 2)
        for panel in (self.left, self.right):
            panel.grid(alpha=0.3)

    def images(self, title: str, rows: list[tuple[str, Tensor]], columns: list[str]) -> None:
        """Draws the first images of every row, one a column."""
        panel = self.bottom.subplots()
        show(panel, [(name, images[: len(columns)]) for name, images in rows], columns)
        panel.set_title(title)

    def save(self, path: Path) -> None:
        save(self.figure, path)
        click.echo(f"\npicture: {path}")


class Peak(TorchDispatchMode):
    """Sees every tensor operation: the bytes of the living tensors made inside, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.living: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf.untyped_storage())
        return result

    def note(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        if key in self.living:  # a view
            return
        self.living.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self.living.discard(key)
            self.now -= size

        weakref.finalize(memory, freed)
