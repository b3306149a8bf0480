# SPDX-License-Identifier: Apache-2.0
"""Samplers of distilled networks as their papers write them.

`f(x, t)` is what the paper calls the network's data prediction, x0 or the consistency function; z
is a list of normals, one a step.
"""

import itertools
import math


def lcm(f, x, times, alpha, sigma, scalings, z):
    """Luo et al., arXiv:2310.04378: multistep latent consistency sampling."""
    for n, t in enumerate(times[:-1]):
        c_skip, c_out = scalings(t)
        denoised = c_skip * x + c_out * f(x, t)
        last = n == len(times) - 2
        x = denoised if last else alpha(times[n + 1]) * denoised + sigma(times[n + 1]) * z[n]
    return x


def tcd(f, x, times, alpha, sigma, gamma, z):
    """Zheng et al., arXiv:2402.19159: strategic stochastic sampling, alpha² + sigma² = 1."""
    for n, t in enumerate(times[:-1]):
        u = times[n + 1]
        s = (1.0 - gamma) * u
        x0 = f(x, t)
        epsilon = (x - alpha(t) * x0) / sigma(t)
        x_s = alpha(s) * x0 + sigma(s) * epsilon
        ratio = alpha(u) / alpha(s)
        x = ratio * x_s + math.sqrt(max(1.0 - ratio**2, 0.0)) * z[n]
    return x


def consistency(f, x, times, eps, z):
    """Song et al., arXiv:2303.01469, Algorithm 1: alpha = 1, t = sigma > eps."""
    x = f(x, times[0])
    for n, t in enumerate(times[1:]):
        noised = x + math.sqrt(t**2 - eps**2) * z[n]
        x = f(noised, t)
    return x


def nstep_stochastic(f, x, times, alpha, sigma, z):
    """Meng et al., arXiv:2210.03142: 2/N down by DDIM, 1/N up by noise."""
    for n, t in enumerate(times[:-1]):
        u, s = times[n + 1], times[min(n + 2, len(times) - 1)]
        x0 = f(x, t)
        x = alpha(s) * x0 + sigma(s) * (x - alpha(t) * x0) / sigma(t)
        if s < u:
            ratio = alpha(u) / alpha(s)
            x = ratio * x + math.sqrt(sigma(u) ** 2 - (ratio * sigma(s)) ** 2) * z[n]
    return x


def progressive(f, x, times, alpha, sigma):
    """Salimans & Ho, arXiv:2202.00512: z_s from x and z_t."""
    for t, s in itertools.pairwise(times):
        x0 = f(x, t)
        x = alpha(s) * x0 + sigma(s) * (x - alpha(t) * x0) / sigma(t)
    return x
