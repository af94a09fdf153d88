"""Templates to pages: everything is escaped but what samq itself draws (plots, style sheet)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import samq
from samq.tools.report import units

TEMPLATES = Path(__file__).with_name("templates")
FIGURES = (units.number, units.data_size, units.milliseconds, units.seconds, units.percent, units.counted)


def render(template: str, **context: Any) -> str:
    """A page of a template's name and what it needs."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: _unbroken(function) for function in FIGURES}, dotted=_dotted)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    environment.globals.update(style=Markup(style), version=samq.__version__)
    return environment


def _unbroken(figure: Callable[..., str]) -> Callable[..., str]:
    """A figure that stays on one line with its unit."""
    return lambda *values: figure(*values).replace(" ", "\N{NO-BREAK SPACE}")


def _dotted(name: str) -> Markup:
    """A layer's name, which may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))
