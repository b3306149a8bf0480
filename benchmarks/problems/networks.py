# SPDX-License-Identifier: Apache-2.0
"""Networks of the sizes that people sample from, with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.bench.networks import TimeEmbedding
from fastdiff.models.digits import Block


def _convolved(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(c_in, c_out, 5, padding=2), nn.GroupNorm(8, c_out), nn.Mish())


class Residual(nn.Module):
    """Two convolutions; the condition scales and shifts what lies between them."""

    def __init__(self, c_in: int, c_out: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _convolved(c_in, c_out), _convolved(c_out, c_out)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * c_out))
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class ConvPolicy(nn.Module):
    """The conditional 1-D U-Net of diffusion policies, in the form of LeRobot's.

    Noisy actions [B, horizon, actions] are convolved over the horizon, which halves from level to
    level; time and observation condition every block.

    Source: Chi et al., "Diffusion Policy", arXiv:2303.04137, section 3.1.
    """

    def __init__(self, actions: int, observed: int, widths: Sequence[int]) -> None:
        super().__init__()
        embed, condition = 128, 128 + observed
        self.time = nn.Sequential(
            *(TimeEmbedding(embed), nn.Linear(embed, 4 * embed), nn.Mish()),
            nn.Linear(4 * embed, embed),
        )
        pairs = list(itertools.pairwise((actions, *widths)))

        def two(c_in: int, c_out: int) -> nn.ModuleList:
            return nn.ModuleList(
                [Residual(c_in, c_out, condition), Residual(c_out, c_out, condition)]
            )

        self.down = nn.ModuleList(two(*pair) for pair in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(w, w, 3, 2, 1) for w in widths[:-1])
        self.middle = two(widths[-1], widths[-1])
        self.up = nn.ModuleList(two(2 * c_out, c_in) for c_in, c_out in pairs[:0:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, 2, 1) for w in widths[-2::-1])
        width = widths[0]
        self.last = nn.Sequential(_convolved(width, width), nn.Conv1d(width, actions, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        condition = torch.cat([self.time(t), obs], dim=1)
        h, kept = x.transpose(1, 2), []
        for k, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, condition)
            kept.append(h)
            if k < len(self.shrink):
                h = self.shrink[k](h)
        for block in self.middle:
            h = block(h, condition)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            h = torch.cat([h, kept.pop()], dim=1)
            for block in blocks:
                h = block(h, condition)
            h = grow(h)
        return self.last(h).transpose(1, 2)


class Dit(nn.Module):
    """A transformer of the size of DiT-S/2: 256 patches of width 384, 12 blocks, 32 M parameters.

    Random weights. One linear map makes the modulation of all blocks.
    """

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, size: int = 32) -> None:
        super().__init__()
        self.size, self.depth = size // 2, depth
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(self.size**2, width))
        self.embed = nn.Sequential(TimeEmbedding(width), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * depth * width)
        self.blocks = nn.ModuleList(Block(width, heads, 4, 0.0) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        modulation = self.modulation(F.silu(self.embed(t)))
        modulation = modulation.view(len(x), self.depth, 6, 1, -1)
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[:, i])
        h = self.out(F.layer_norm(h, h.shape[-1:])).transpose(1, 2)
        return F.pixel_shuffle(h.reshape(len(x), 16, self.size, self.size), 2)


class FromDiffusers(nn.Module):
    """One of diffusers' models, called as network(x, t, cond)."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.model(x, timestep=t, **{self.name: cond}, return_dict=False)[0]


def dit() -> nn.Module:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_layers=12,
        num_attention_heads=6,
        attention_head_dim=64,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        sample_size=32,
    )
    return FromDiffusers(model, "class_labels")


def unet(small: bool) -> nn.Module:
    import diffusers

    if small:
        model = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            sample_size=32,
        )
    else:  # the defaults of the class are those of Stable Diffusion 1.5
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    return FromDiffusers(model, "encoder_hidden_states")
