# SPDX-License-Identifier: Apache-2.0
"""Loops that go back up, as their papers write them; z yields normals."""

import itertools
import math


def heun(denoise, x, t_cur, t_next):
    d_cur = (x - denoise(x, t_cur)) / t_cur
    x_next = x + (t_next - t_cur) * d_cur
    if t_next > 0.0:
        d_prime = (x_next - denoise(x_next, t_next)) / t_next
        x_next = x + (t_next - t_cur) * 0.5 * (d_cur + d_prime)
    return x_next


def karras(count, low, high, rho=7.0):
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (count - 1) * (ends[1] - ends[0])) ** rho for i in range(count)]


def restart(denoise, x, steps, restarts, s_noise, z):
    """Xu et al., arXiv:2306.14878, section 3, by Heun on EDM's noise levels.

    restarts: (times of the stretch, K, t_min, t_max), as the authors' code takes them.
    """
    times = [*karras(steps, 0.002, 80.0), 0.0]
    nearest = {min(range(steps + 1), key=lambda i: abs(times[i] - r[2])): r for r in restarts}
    for i in range(steps):
        x = heun(denoise, x, times[i], times[i + 1])
        if i + 1 in nearest:
            count, repeats, _, high = nearest[i + 1]
            again = karras(count, times[i + 1], high)
            for _ in range(repeats):
                x = x + s_noise * math.sqrt(again[0] ** 2 - again[-1] ** 2) * next(z)
                for cur, nxt in itertools.pairwise(again):
                    x = heun(denoise, x, cur, nxt)
    return x


def repaint_times(count, jump_length, jump_n_sample):
    """Lugmayr et al., arXiv:2201.09865: indices from count - 1 down to -1."""
    jumps = dict.fromkeys(range(0, count - jump_length, jump_length), jump_n_sample - 1)
    t, visited = count, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                visited.append(t)
    return [*visited, -1]


def universal_recurrence(step, x, times, alpha, sigma, repeats, z):
    """Bansal et al., arXiv:2302.07121: each step but the last, `repeats` times."""
    for n in range(len(times) - 1):
        t, s = times[n], times[n + 1]
        count = repeats if n < len(times) - 2 else 1
        for k in range(count):
            below = step(x, t, s)
            if k < count - 1:
                ratio = alpha(t) / alpha(s)
                x = ratio * below + math.sqrt(sigma(t) ** 2 - (ratio * sigma(s)) ** 2) * next(z)
        x = below
    return x
