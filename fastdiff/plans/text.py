# SPDX-License-Identifier: Apache-2.0
"""A plan as a table that people read."""

from __future__ import annotations

from collections.abc import Sequence

from .stage import Stage, evaluated_at_e
from .terms import Measure, Operand, Product, Reduction

Term = tuple[float, str]


def show(title: str, stages: Sequence[Stage]) -> str:
    """The title, and a line or more for each stage: its evaluation, its h and its update."""
    table = [("n", "t", "h", ["update"])]
    for n, (stage, at_e) in enumerate(zip(stages, evaluated_at_e(stages), strict=True)):
        table.append((str(n), f"{stage.t:.6g}", _output(stage, at_e), _update(stage, at_e)))
    n_wide, t_wide, h_wide = (max(len(str(row[i])) for row in table) for i in range(3))
    lines = [title]
    for n_text, t_text, h, rows in table:
        head = f"{n_text:>{n_wide}}  {t_text:>{t_wide}}  {h:<{h_wide}}  "
        lines += [head + rows[0], *(" " * len(head) + row for row in rows[1:])]
    return "\n".join(lines)


def _output(s: Stage, at_e: bool) -> str:
    """h, and y where the update reads it too."""
    if not s.evaluate:
        return "-"
    return _combination([(s.u, "e" if at_e else "x"), (s.v, _limited(s, at_e))])


def _limited(s: Stage, at_e: bool) -> str:
    y = _y(s, at_e)
    if s.clip is not None:
        return f"clip({y}, {s.clip[0]:g}, {s.clip[1]:g})"
    if s.threshold is not None:
        return f"threshold({y}, {', '.join(f'{value:g}' for value in s.threshold)})"
    return f"({y})" if (s.u, s.v) != (0.0, 1.0) else y


def _y(s: Stage, at_e: bool) -> str:
    point = "e" if at_e else "x"
    output = "out" if not any(name[0] == "w" for name, _ in s.scalars) else _branches(s)
    terms = [(s.p, point), (s.q, output), *_products(s, "y", point)]
    return _combination(terms)


def _branches(s: Stage) -> str:
    """The output, where branch weights are scaled by columns of S."""
    scales = ", ".join(f"{name} S{column}" for name, column in s.scalars if name[0] == "w")
    return f"out[{scales}]"


def _update(s: Stage, at_e: bool) -> list[str]:
    """The lines of a stage: measures, x', e', the noise, and y where the update reads it."""
    lines = [f"S{m.into} = {_measure(m)}" for m in s.measures]
    columns = dict(s.scalars)

    def scaled(name: str, register: str) -> str:
        return f"S{columns[name]} {register}" if name in columns else register

    def outputs(weights: tuple[float, ...], name: str) -> list[Term]:
        return [(w, f"H{j}" if j else scaled(name, "h")) for j, w in enumerate(weights)]

    if s.writes_x or not s.writes_e:
        terms = [(s.a_x, "x"), (s.a_e, "e"), *outputs(s.b, "b_0"), (s.b_raw, "y")]
        terms += [(s.c, scaled("c", "xi")), *_registers(s.r), *_products(s, "x", "")]
        lines.append("x' = " + _combination(terms))
    if s.writes_e:
        terms = [(s.d_x, "x"), (s.d_e, "e"), *outputs(s.g, "g_0"), (s.g_raw, "y")]
        terms += [
            (s.c_e, scaled("c_e", "xi")),
            *_registers(s.s),
            (s.d_new, "x'"),
            *_products(s, "e", ""),
        ]
        lines.append("e' = " + _combination(terms))
    if s.noise and s.noise != ((s.noise[0][0], 1.0),):
        lines.append("xi = " + _combination([(w, f"z_{k}") for k, w in s.noise]))
    if s.evaluate and (s.b_raw or s.g_raw):
        lines.append("y = " + _y(s, at_e))
    return lines


def _registers(weights: tuple[float, ...]) -> list[Term]:
    return [(w, f"R{i}") for i, w in enumerate(weights)]


def _products(s: Stage, into: str, point: str) -> list[Term]:
    return [(p.weight, f"R{p.entry} {_factor(p, point)}") for p in s.products if p.into == into]


def _factor(p: Product, point: str) -> str:
    if p.of == "new":
        return "x'" if p.into == "e" else "(all before)"
    names = {"history": f"H{p.at}", "bank": f"R{p.at}", "point": point}
    return names.get(p.of, p.of)


def _measure(m: Measure) -> str:
    ratio = _reduction(m.num)
    if m.den is not None:
        ratio += f" / {_reduction(m.den)}"
    if m.power != 1.0:
        ratio = f"({ratio})^{m.power:.6g}"
    text = _combination([(m.weight, ratio)])
    return text if m.offset == 0.0 else f"{m.offset:.6g} + {text}"


def _reduction(r: Reduction) -> str:
    inner = ", ".join(map(_operand, r.operands))
    return f"{r.kind}({inner}, {r.rank:g})" if r.kind == "quantile" else f"{r.kind}({inner})"


def _operand(operand: Operand) -> str:
    if len(operand) == 1:
        return operand[0]
    kind, place = operand
    return {"out": f"out_{place}", "history": f"H{place}", "bank": f"R{place}"}[kind]


def _combination(terms: list[Term]) -> str:
    text = ""
    for weight, name in terms:
        if weight == 0.0:
            continue
        size = "" if abs(weight) == 1.0 else f"{abs(weight):.6g} "
        sign = (" - " if weight < 0 else " + ") if text else ("-" if weight < 0 else "")
        text += f"{sign}{size}{name}"
    return text or "0"
