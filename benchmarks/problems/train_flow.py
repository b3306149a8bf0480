# SPDX-License-Identifier: Apache-2.0
"""Train the velocity network of `velocity.py` with torchcfm, a minute on one CPU core.

    pip install torchcfm==1.0.7
    python benchmarks/problems/train_flow.py

The benchmarks read the weights that this wrote and need no torchcfm.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from safetensors.torch import save_file
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from velocity import WEIGHTS, Velocity, two_moons

SEED, STEPS, BATCH, RATE = 0, 20_000, 512, 3e-3


def train() -> tuple[Velocity, float]:
    """The network after training, and its mean loss over the last thousandth of the steps."""
    torch.manual_seed(SEED)
    network, matcher = Velocity(), ConditionalFlowMatcher(sigma=0.0)
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    losses = []
    for _ in range(STEPS):
        data = two_moons(BATCH)
        clock, x, wanted = matcher.sample_location_and_conditional_flow(
            torch.randn_like(data), data
        )
        loss = (network.to_data(x, clock) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        losses.append(float(loss.detach()))
    last = losses[-STEPS // 1000 :]
    return network, sum(last) / len(last)


def main() -> None:
    network, loss = train()
    made = {
        "package": f"torchcfm {version('torchcfm')}, ConditionalFlowMatcher(sigma=0.0)",
        "data": "two_moons",
        "settings": f"seed {SEED}, {STEPS} steps of {BATCH}, Adam {RATE:g} falling to 0 (cosine)",
        "loss": f"{loss:.4f}",
        "torch": torch.__version__,
    }
    save_file(network.state_dict(), WEIGHTS, metadata=made)
    print(made)


if __name__ == "__main__":
    main()
