# SPDX-License-Identifier: Apache-2.0
"""Models whose network output is known exactly: a Gaussian mixture, and what any such model shares.

An exact model needs one thing: the posterior mean of x0 and the score at (x, alpha, sigma). Every
prediction is linear in these two, and `Schedule.components` says how, so that the conversions
stand once, in `ExactModel`. Arithmetic is float64 whatever the dtype of x. `network()` reads its
times on the host: these models measure samplers and cannot be captured in a graph.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..schedules import Array, Schedule, prediction_name

Network: TypeAlias = Callable[..., Tensor]
Scale: TypeAlias = float | Array | Tensor


def as_float64(values: ArrayLike | Tensor) -> Tensor:
    """values as a float64 tensor; a tensor keeps its device and its autograd history."""
    return torch.as_tensor(values, dtype=torch.float64)


class ExactModel(abc.ABC):
    """Every prediction of a data distribution whose posterior mean and score are known.

    Shapes: x is [B, ...] of any floating dtype; alpha and sigma are numbers or of shape [B]; y, the
    class ids, are of shape [B] (or [] for all), integers, -1 for no class. Results have the shape
    and dtype of x, and are differentiable in x, to any order.
    """

    labels: Tensor | None
    """Class id of every component, int64 [K]."""

    @abc.abstractmethod
    def _x0_and_score(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E[x0 | x] and grad_x log p(x), float64 [B, D], of x [B, D], alpha and sigma [B, 1]."""

    def x0(self, x: Tensor, alpha: Scale, sigma: Scale, y: Tensor | None = None) -> Tensor:
        """The best x0 prediction, E[x0 | x]."""
        return self._predict(x, alpha, sigma, y, 1.0, 0.0)

    def epsilon(self, x: Tensor, alpha: Scale, sigma: Scale, y: Tensor | None = None) -> Tensor:
        """The best noise prediction, E[eps | x] = -sigma score."""
        return self._predict(x, alpha, sigma, y, 0.0, -as_float64(sigma))

    def score(self, x: Tensor, alpha: Scale, sigma: Scale, y: Tensor | None = None) -> Tensor:
        """grad_x log p(x), p the density of x = alpha x0 + sigma eps."""
        return self._predict(x, alpha, sigma, y, 0.0, 1.0)

    def v(self, x: Tensor, alpha: Scale, sigma: Scale, y: Tensor | None = None) -> Tensor:
        """alpha epsilon - sigma x0."""
        alpha, sigma = as_float64(alpha), as_float64(sigma)
        return self._predict(x, alpha, sigma, y, -sigma, -alpha * sigma)

    def network(self, schedule: Schedule, prediction: str = "epsilon") -> Network:
        """The model as a trained network of this prediction under this schedule.

        Args:
            schedule: Any schedule; its model time and input scaling are undone.
            prediction: One of `fastdiff.schedules.PREDICTIONS`, or an alias.

        Returns:
            `network(x, model_time, y=None)`: x [B, ...] as the library feeds it (c_in x_t),
            model_time [B] or [] in the network's units, y as in the class. At the ends of the
            schedule it returns the limit wherever there is one (a velocity at sigma = 0).

        Raises:
            ValueError: The prediction is unknown.
        """
        prediction = prediction_name(prediction)

        def network(x: Tensor, model_time: Tensor, y: Tensor | None = None) -> Tensor:
            told = torch.as_tensor(model_time).detach().to("cpu", torch.float64).numpy()
            t = schedule.time_of_model(told, prediction)
            c_in = schedule.c_in(t, prediction)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            # output = u x0 + w eps = u x0 - (w sigma) score
            u, w = schedule.components(prediction, t)
            with np.errstate(invalid="ignore"):
                w_sigma = w * sigma
            if not np.all(np.isfinite(w)):  # w -> inf as sigma -> 0, and w sigma has a limit
                limit = -1.0 if prediction == "score" else 0.5 * schedule.g2(t)
                w_sigma = np.where(np.isfinite(w), w_sigma, limit)
            return self._predict(x, alpha, sigma, y, u, -w_sigma, c_in)

        return network

    def _predict(
        self,
        x: Tensor,
        alpha: Scale,
        sigma: Scale,
        y: Tensor | None,
        of_x0: Scale,
        of_score: Scale,
        c_in: Scale = 1.0,
    ) -> Tensor:
        """of_x0 E[x0 | x/c_in] + of_score score(x/c_in), in x's shape and dtype."""
        who = type(self).__name__
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{who}: x is a floating tensor; got {got}. Convert it first.")
        size = self._shape.numel()
        if x.ndim < 1 or x[:1].numel() != size * min(len(x), 1):
            raise ValueError(
                f"{who}: x has shape [B, ...] with {size} elements per sample; "
                f"got {list(x.shape)}. Add the batch dimension, or check the data's shape."
            )
        alpha, sigma, of_x0, of_score, c_in = (
            self._column(who, value, x) for value in (alpha, sigma, of_x0, of_score, c_in)
        )
        rows = x.double().reshape(len(x), size) / c_in
        x0, score = self._x0_and_score(rows, alpha, sigma, y)
        return (of_x0 * x0 + of_score * score).to(x.dtype).reshape(x.shape)

    @property
    @abc.abstractmethod
    def _shape(self) -> torch.Size:
        """One sample's shape."""

    @staticmethod
    def _column(who: str, value: Scale, x: Tensor) -> Tensor:
        """A number or [B] -> [1, 1] or [B, 1] on x's device."""
        column = as_float64(value).to(x.device).reshape(-1, 1)
        if len(column) not in (1, len(x)):
            raise ValueError(
                f"{who}: alpha, sigma and times are numbers or of shape [B] = [{len(x)}]; got "
                f"{len(column)} values. Give one per sample, or one for all."
            )
        return column

    def _among(self, y: Tensor | None, log_weights: Tensor) -> Tensor:
        """Log weights [K] given the class: [1, K], or [B, K] with -inf outside the class."""
        if y is None:
            return log_weights[None]
        who = type(self).__name__
        if self.labels is None:
            raise ValueError(
                f"{who}: y conditions on labels; got y without labels. "
                f"Give labels to {who}(...), or leave y out."
            )
        y = torch.as_tensor(y, device=log_weights.device)
        if y.is_floating_point():
            raise TypeError(f"{who}: y holds integer class ids, -1 for none; got {y.dtype}.")
        y = y.reshape(-1, 1)
        chosen = (y < 0) | (y == self.labels.to(y.device))
        if not bool(chosen.any(1).all()):
            bad = int(y[~chosen.any(1)][0])
            raise ValueError(
                f"{who}: y holds ids found in labels, or -1 for no class; got {bad}. "
                f"There are: {sorted(set(self.labels.tolist()))}."
            )
        return torch.where(chosen, log_weights, -math.inf)


class GaussianMixture(ExactModel):
    """Mixture of Gaussians with diagonal covariances: the exact network of a distribution.

    The density of x_t is sum_k w_k N(alpha mu_k, diag(alpha² var_k + sigma²)). With
    r_k = P(k | x), by a softmax of log densities,

        score = sum_k r_k (alpha mu_k - x) / (alpha² var_k + sigma²)
        x0    = sum_k r_k (mu_k + alpha var_k / (alpha² var_k + sigma²) (x - alpha mu_k))

    Both are finite and exact for every alpha >= 0 and sigma >= 0 not both 0: x0 = x / alpha at
    sigma = 0, the mean of the data at alpha = 0.

    Args:
        weights: Probabilities w [K], non-negative, scaled to sum 1. A number: all equal.
        means: mu, [K, D].
        variances: Diagonals of the covariances, positive, [K, D] or anything that broadcasts to it.

    Raises:
        ValueError: Shapes do not fit, or a value is out of its range.

    Tensors keep their autograd history, so outputs are differentiable in the parameters too.
    Class ids y are the components' indices 0 .. K - 1.
    """

    def __init__(
        self,
        weights: ArrayLike | Tensor,
        means: ArrayLike | Tensor,
        variances: ArrayLike | Tensor,
    ) -> None:
        self.means = as_float64(means)
        if self.means.ndim != 2 or not self.means.numel():
            raise ValueError(
                f"GaussianMixture: means has shape [K, D]; got {list(self.means.shape)}. "
                "Flatten each component's mean."
            )
        count = len(self.means)
        self.weights = self._fit("weights", weights, (count,))
        self.variances = self._fit("variances", variances, tuple(self.means.shape))
        if not bool((self.weights >= 0).all() and 0 < self.weights.sum() < math.inf):
            raise ValueError(
                "GaussianMixture: weights are non-negative with a positive sum; got "
                f"{self.weights.tolist()}."
            )
        if not bool((self.variances > 0).all() and self.variances.isfinite().all()):
            raise ValueError(
                "GaussianMixture: variances are positive and finite; got values from "
                f"{self.variances.min():.6g} to {self.variances.max():.6g}. "
                "EmpiricalDenoiser is the mixture of points."
            )
        self.weights = self.weights / self.weights.sum()
        self.labels = torch.arange(count, device=self.means.device)

    def _fit(self, name: str, values: ArrayLike | Tensor, shape: tuple[int, ...]) -> Tensor:
        tensor = as_float64(values).to(self.means.device)
        try:
            return tensor.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"GaussianMixture: {name} broadcasts to {list(shape)} (means is "
                f"{list(self.means.shape)}); got {list(tensor.shape)}."
            ) from None

    @property
    def _shape(self) -> torch.Size:
        return self.means.shape[1:]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x0 n times, float64 [n, D], on the mixture's device (the generator's too).

        Raises:
            ValueError: n < 0.
        """
        if n < 0:
            raise ValueError(f"GaussianMixture.sample: n is at least 0; got {n}.")
        means, deviations = self.means.detach(), self.variances.detach().sqrt()
        # by the inverse distribution function: multinomial stops at 2**24 categories and zero n
        uniform = torch.rand(n, generator=generator, dtype=torch.float64, device=means.device)
        cumulative = self.weights.detach().cumsum(0)
        k = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        noise = torch.randn(
            (n, means.shape[1]), generator=generator, dtype=torch.float64, device=means.device
        )
        return means[k] + deviations[k] * noise

    def _x0_and_score(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights, means, variances = (
            part.to(x.device) for part in (self.weights, self.means, self.variances)
        )
        alpha, sigma = alpha[..., None], sigma[..., None]  # [B, 1, 1]
        spread = alpha.square() * variances + sigma.square()  # [B, K, D]
        offset = x[:, None] - alpha * means
        pull = offset / spread
        log_density = -0.5 * ((offset * pull).sum(2) + spread.log().sum(2))
        r = (self._among(y, weights.log()) + log_density).softmax(1)[..., None]  # [B, K, 1]
        return (r * (means + alpha * variances * pull)).sum(1), -(r * pull).sum(1)
