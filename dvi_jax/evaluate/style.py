"""The one style of all pictures, and drawing each of them twice: for light pages and for dark ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dvi_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours by their place in a theme's cycle, so that a picture need not know its theme.
CYCLE = BLUE, ORANGE, GREEN, PINK, PURPLE, CYAN = tuple(f"C{place}" for place in range(6))
GREY = "C6"  # of what is there to compare with
DOTS_PER_INCH = 144
Theme = Literal["light", "dark"]
_CYCLES: dict[Theme, tuple[str, ...]] = {
    "light": ("#2563eb", "#d97706", "#0f9d76", "#b83280", "#7c3aed", "#0891b2", "#9aa4b0"),
    "dark": ("#60a5fa", "#f59e0b", "#34d399", "#f472b6", "#c084fc", "#22d3ee", "#6e7986"),
}
_PAGES: dict[Theme, dict[str, str]] = {  # background, letters, axes, grid
    "light": {"page": "#ffffff", "letters": "#1c2430", "axes": "#5b6572", "grid": "#e3e6ea"},
    "dark": {"page": "#0d1117", "letters": "#e6edf3", "axes": "#9aa4b0", "grid": "#262d36"},
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; raises `UserError` without matplotlib. Needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'dvi-jax[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)


@contextmanager
def theme(name: Theme) -> Iterator[None]:
    """What is drawn and saved inside has a theme's colours; raises `UserError` without matplotlib."""
    new_figure(1, 1)
    from cycler import cycler
    from matplotlib import rc_context

    page = _PAGES[name]
    style: Any = {  # by names that are a type of their own
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), page["page"]),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), page["letters"]),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), page["axes"]),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), page["letters"]),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **{"grid.color": page["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True},
        **{"font.size": 10, "legend.fontsize": 9, "axes.titlesize": 10, "axes.titlelocation": "left"},
        **{"lines.linewidth": 1.6, "lines.markersize": 5, "axes.prop_cycle": cycler(color=_CYCLES[name])},
        "svg.hashsalt": "dvi_jax",  # the same picture is the same file
    }
    with rc_context(style):
        yield


def save_picture(draw: Callable[[], Figure], path: str | Path) -> list[Path]:
    """Save what `draw` draws as `NAME.png` (or .svg) and, for dark pages, as `NAME-dark.png`: the paths of both."""
    light = Path(path)
    paths: dict[Theme, Path] = {"light": light, "dark": light.with_stem(f"{light.stem}-dark")}
    for name, place in paths.items():
        with theme(name):
            draw().savefig(place)
    return [*paths.values()]


def svg(draw: Callable[[], Figure], name: Theme) -> bytes:
    """What `draw` draws, as an SVG."""
    buffer = io.BytesIO()
    with theme(name):
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def page_color() -> str:
    """The background of the theme that is drawn for: what a hollow mark is filled with."""
    from matplotlib import rcParams

    return rcParams["figure.facecolor"]


def mark_equal(axes: Axes, at: float = 1.0, *, label: str | None = None, upright: bool = False) -> None:
    """A line where two things are equally fast: a speed-up of 1, or the tokens of a round that pay for it."""
    (axes.axvline if upright else axes.axhline)(at, color=ORANGE, linewidth=1.2, linestyle="--", label=label, zorder=1)
