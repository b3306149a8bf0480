# SPDX-License-Identifier: Apache-2.0
"""Multistep and singlestep samplers as loops over sigmas, with alpha = 1.

`denoise(x, sigma)` is the network's x0; d = (x - x0)/sigma is its epsilon, dx/dsigma of the flow.
"""

import itertools
import math

import numpy as np


def derivative(denoise, x, sigma):
    return (x - denoise(x, sigma)) / sigma


def phi(k, z):
    """phi_k(z), by its integral: 1/(k - 1)! int_0^1 exp((1 - u) z) u^(k-1) du."""
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = 0.5 * (u + 1.0), 0.5 * w
    return float(w @ (np.exp((1.0 - u) * z) * u ** (k - 1))) / math.factorial(k - 1)


def linear_multistep(denoise, x, sigmas, order):
    """Adams-Bashforth in sigma: the polynomial through the last derivatives, integrated."""
    ds, at = [], []
    for s, t in itertools.pairwise(sigmas):
        ds, at = [derivative(denoise, x, s), *ds][:order], [s, *at][:order]
        for node, d in zip(at, ds, strict=True):
            others = [other for other in at if other != node]
            basis = np.poly1d([1.0])
            for other in others:
                basis = basis * np.poly1d([1.0, -other]) / (node - other)
            primitive = basis.integ()
            x = x + (primitive(t) - primitive(s)) * d
    return x


def gradient_estimation(denoise, x, sigmas, gamma):
    old = None
    for s, t in itertools.pairwise(sigmas):
        d = derivative(denoise, x, s)
        x = x + (t - s) * (d if old is None else gamma * d + (1.0 - gamma) * old)
        old = d
    return x


def res_multistep(denoise, x, sigmas, order):
    """RES by its stiff order conditions, sum_j b_j c_j^k / k! = phi_{k+1}(-h), in -log sigma."""
    lam, past, at = -np.log(sigmas), [], []
    for i, s in enumerate(sigmas[:-1]):
        past, at = [denoise(x, s), *past][:order], [lam[i], *at][:order]
        h = lam[i + 1] - lam[i]
        c = (np.array(at) - lam[i]) / h
        conditions = [c**k / math.factorial(k) for k in range(len(c))]
        b = np.linalg.solve(conditions, [phi(k + 1, -h) for k in range(len(c))])
        x = np.exp(-h) * x + h * sum(w * d for w, d in zip(b, past, strict=True))
    return x


def res4lyf_3m(denoise, x, sigmas, start, power=3):
    """RES4LYF's res_3m, whose gamma has c3 to the power 3; 2 satisfies the condition.

    `start` is the state at sigmas[1] and sigmas[2], which a method of order 3 has made.
    """
    lam = -np.log(sigmas)
    states = [x, *start]
    past = [denoise(y, s) for y, s in zip(states[:2], sigmas, strict=False)][::-1]
    x = states[2]
    for i in range(2, len(sigmas) - 1):
        past = [denoise(x, sigmas[i]), *past][:3]
        h = lam[i + 1] - lam[i]
        c2, c3 = (lam[i - 1] - lam[i]) / h, (lam[i - 2] - lam[i]) / h
        gamma = (3.0 * c3**power - 2.0 * c3) / (c2 * (2.0 - 3.0 * c2))
        b3 = phi(2, -h) / (gamma * c2 + c3)
        b = [phi(1, -h) - (1.0 + gamma) * b3, gamma * b3, b3]
        x = np.exp(-h) * x + h * sum(w * d for w, d in zip(b, past, strict=True))
    return x


def res_singlestep(denoise, x, sigmas, nodes, gamma_power=2):
    """RES 2S (nodes = (c2,)) and 3S (nodes = (c2, c3)); c2 = 1 is exponential Heun."""
    for s, t in itertools.pairwise(sigmas):
        h, c2 = math.log(s / t), nodes[0]
        first = denoise(x, s)
        u = math.exp(-c2 * h) * x + h * c2 * phi(1, -c2 * h) * first
        second = denoise(u, s * math.exp(-c2 * h))
        if len(nodes) == 1:
            b = [(phi(2, -h) / c2, second)]
        else:
            c3 = nodes[1]
            gamma = (3.0 * c3**gamma_power - 2.0 * c3) / (c2 * (2.0 - 3.0 * c2))
            a = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
            v = math.exp(-c3 * h) * x + h * (c3 * phi(1, -c3 * h) * first + a * (second - first))
            third = denoise(v, s * math.exp(-c3 * h))
            b3 = phi(2, -h) / (gamma * c2 + c3)
            b = [(gamma * b3, second), (b3, third)]
        x = math.exp(-h) * x + h * phi(1, -h) * first
        x = x + h * sum(w * (d - first) for w, d in b)
    return x


def pndm(epsilon, alpha, sigma, x, times, skip_prk_steps):
    """PNDM and PLMS by DDIM's transfer; `epsilon(x, t)` is the network."""

    def ddim(x, e, s, t):
        return alpha(t) / alpha(s) * x + (sigma(t) - alpha(t) * sigma(s) / alpha(s)) * e

    weights = (
        (1.0,),
        (1.5, -0.5),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -3 / 8),
    )
    past = []
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        e = epsilon(x, s)
        past = [e, *past][:4]
        middle = 0.5 * (s + t)
        if i < 3 and not skip_prk_steps:
            e2 = epsilon(ddim(x, e, s, middle), middle)
            e3 = epsilon(ddim(x, e2, s, middle), middle)
            e4 = epsilon(ddim(x, e3, s, t), t)
            x = ddim(x, (e + 2.0 * e2 + 2.0 * e3 + e4) / 6.0, s, t)
        elif i == 0 and len(times) > 2:
            x = ddim(x, 0.5 * (e + epsilon(ddim(x, e, s, t), t)), s, t)
        else:
            combined = sum(w * e for w, e in zip(weights[len(past) - 1], past, strict=True))
            x = ddim(x, combined, s, t)
    return x
