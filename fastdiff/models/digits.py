# SPDX-License-Identifier: Apache-2.0
"""A small class-conditional diffusion transformer for 8x8 digits, its classifier and their data.

The network is trained, and evaluates in milliseconds on a CPU core: enough to see a sampler's
quality, guidance and gradients without a download. It is a toy in every other respect;
`docs/model-card-digits.md` says what it was trained on, how well it does and what it is not for.

Images are [1, 8, 8] in [-1, 1] (ink is +1). The weights stand beside this file as safetensors;
`examples/train_digits.py` makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedules import VPLinear

_Module = TypeVar("_Module", bound=nn.Module)
_HERE = Path(__file__).parent
_TRAIN_IMAGES = 1437  # of 1797


class Block(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the conditioning."""

    def __init__(self, width: int, heads: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, ratio * width)
        self.mlp_out = nn.Linear(ratio * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, T, W], modulation [B, 6, 1, W] -> [B, T, W]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(1)
        batch, tokens, width = x.shape
        h = torch.addcmul(shift_1, F.layer_norm(x, (width,)), 1 + scale_1)
        qkv = self.qkv(h).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = torch.addcmul(x, gate_1, self.dropout(self.attention_out(h)))
        h = torch.addcmul(shift_2, F.layer_norm(x, (width,)), 1 + scale_2)
        h = self.mlp_out(self.dropout(F.gelu(self.mlp_in(h), approximate="tanh")))
        return torch.addcmul(x, gate_2, h)


class DigitsDiT(nn.Module):
    """Diffusion transformer on 2x2 patches of an 8x8 image, conditioned on time and class.

    `network(x, t, y)` predicts v = alpha_t eps - sigma_t x0 under `schedule`. It synchronises with
    the host nowhere, so it can be captured in a graph, and follows `.double()` or `.to(device)`.

    Attributes:
        schedule: `VPLinear(beta_min=0.1, beta_max=20.0)`; trained for t in (1e-3, 1].
        prediction: `"v"`.
        null_class: 10, the class id that means "no class", for guidance.
        shape: (1, 8, 8), one sample's shape.

    Args:
        width: Channels per token; a multiple of 2 * heads.
        depth: Number of blocks.
        heads: Attention heads.
        ratio: Hidden width of a block's MLP over `width`.
        dropout: Rate in the blocks while training.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748
    (adaLN-Zero blocks; here one linear map makes the modulation of all blocks).
    """

    prediction = "v"
    null_class = 10
    shape = (1, 8, 8)

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.schedule = VPLinear(beta_min=0.1, beta_max=20.0)
        self.width, self.depth = width, depth
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.label = nn.Embedding(self.null_class + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, (6 * depth + 2) * width)
        self.blocks = nn.ModuleList(Block(width, heads, ratio, dropout) for _ in range(depth))
        self.out = nn.Linear(width, 4)
        # radians per unit of t: from a twelfth of a turn over the run to one turn in 0.006
        frequency = torch.exp(torch.linspace(math.log(0.5), math.log(1000.0), width // 2))
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)
        for layer in (self.modulation, self.out):  # zero: every block starts as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict v.

        Args:
            x: Noisy images x_t, shape [B, 1, 8, 8], in the dtype of the parameters.
            t: The schedule's time, shape [B] (or [] for all), any floating dtype, in (1e-3, 1].
            y: Class ids, shape [B] (or [] for all), int64, 0..9 or 10 = no class. None: no class.

        Returns:
            v, shape and dtype of x.

        Raises:
            ValueError: The shape of x is not [B, 1, 8, 8].
        """
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"DigitsDiT: x has shape [B, 1, 8, 8]; got {list(x.shape)}. "
                "Reshape the images, or add the batch dimension with x[None]."
            )
        batch = x.shape[0]
        angle = t.to(x.dtype).reshape(-1, 1) * self.frequency
        c = self.time(torch.cat((angle.sin(), angle.cos()), 1))
        c = c + (self.label.weight[-1] if y is None else self.label(y.reshape(-1)))
        modulation = self.modulation(F.silu(c)).view(-1, 6 * self.depth + 2, 1, self.width)
        # [B, 1, 8, 8] -> 16 tokens of 2x2 pixels
        h = x.reshape(batch, 4, 2, 4, 2).transpose(2, 3).reshape(batch, 16, 4)
        h = self.patch(h) + self.position
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[:, 6 * i : 6 * i + 6])
        shift, scale = modulation[:, -2], modulation[:, -1]
        h = self.out(torch.addcmul(shift, F.layer_norm(h, (self.width,)), 1 + scale))
        return h.view(batch, 4, 4, 2, 2).transpose(2, 3).reshape(x.shape)


class DigitsClassifier(nn.Module):
    """Small convolutional classifier of 8x8 digits; [B, 1, 8, 8] in [-1, 1] -> logits [B, 10]."""

    def __init__(self, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes.

        Args:
            images: Shape [B, 1, 8, 8], in [-1, 1], in the dtype of the parameters.

        Returns:
            Logits, shape [B, 10].
        """
        return self.out(self.dropout(self.features(images).flatten(1)))


def digits(weights: str | Path | None = None) -> DigitsDiT:
    """The trained digits network, in eval mode, float32, on the CPU, with frozen parameters.

    Args:
        weights: A safetensors file written by `examples/train_digits.py`. None: the shipped ones.

    Returns:
        A `DigitsDiT` with `.schedule`, `.prediction`, `.null_class` and `.shape`.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The file is no safetensors file, or holds other tensors.
    """
    return _load("digits", DigitsDiT, "digits", weights)


def digits_classifier(weights: str | Path | None = None) -> DigitsClassifier:
    """The classifier that measures samples of `digits()`, in eval mode, with frozen parameters.

    It was trained on the real images of the training split only; the held-out split measures it.

    Args:
        weights: A safetensors file written by `examples/train_digits.py`. None: the shipped ones.

    Raises:
        ImportError, FileNotFoundError, ValueError: As for `digits`.
    """
    return _load("digits_classifier", DigitsClassifier, "classifier", weights)


def digits_data(split: str = "train") -> tuple[Tensor, Tensor]:
    """The handwritten digits that scikit-learn ships, scaled to [-1, 1], by split.

    Args:
        split: `"train"` (1437 images: all that the network and the classifier were trained on) or
            `"held-out"` (the other 360). The split is one fixed permutation.

    Returns:
        Images, float32 [N, 1, 8, 8] in [-1, 1] (17 grey levels), and class ids, int64 [N].

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: There is no such split.

    Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, doi:10.24432/C50P49; the 1797 images of its test set.
    """
    if split not in ("train", "held-out"):
        raise ValueError(
            f"digits_data: split is 'train' or 'held-out'; got {split!r}. Choose one of the two."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "digits_data: the images come with scikit-learn; it is not installed. "
            "Run: pip install scikit-learn"
        ) from None
    data = load_digits()
    # RandomState, because NumPy freezes its stream: the split never moves under the weights
    order = np.random.RandomState(0).permutation(len(data.images))
    chosen = order[:_TRAIN_IMAGES] if split == "train" else order[_TRAIN_IMAGES:]
    images = torch.from_numpy(data.images[chosen] / 8.0 - 1.0).float().unsqueeze(1)
    return images, torch.from_numpy(data.target[chosen]).long()


def _load(who: str, build: Callable[[], _Module], stem: str, weights: str | Path | None) -> _Module:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(
            f"{who}: the weights are a safetensors file; safetensors is not installed. "
            'Run: pip install "fastdiff-engine[models]"'
        ) from None
    path = _HERE / f"{stem}.safetensors" if weights is None else Path(weights)
    remedy = (
        "Reinstall fastdiff-engine, or train: python examples/train_digits.py"
        if weights is None
        else "Give a file that examples/train_digits.py wrote."
    )
    if not path.is_file():
        raise FileNotFoundError(f"{who}: weights is an existing file; got {path}. {remedy}")
    with torch.random.fork_rng(devices=[]):  # initial values that are overwritten next
        module = build()
    try:
        module.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{who}: weights is a safetensors file; got {path} ({error}). {remedy}"
        ) from error
    except RuntimeError as error:  # load_state_dict: names or shapes differ
        raise ValueError(
            f"{who}: weights holds the tensors of {type(module).__name__}; got {path} ({error}). "
            f"{remedy}"
        ) from error
    return module.eval().requires_grad_(False)
