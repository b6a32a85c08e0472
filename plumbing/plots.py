"""Pictures of figures, by matplotlib: curves of training runs, bars of votes.

They are transparent, in colours that read on white and on black.
"""
from collections.abc import Sequence
from pathlib import Path

from plumbing.files import atomic

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("#3b82d6", "#e0592a", "#2f9e5b", "#a35fd0", "#c98a12", "#12a3b4", "#d64a8a", "#8a7a5c")
GREY = "#7d8691"                        # of text and axes: contrast above 3.6 on white and on black
STYLE = {
    "text.color": GREY, "axes.titlecolor": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY, "grid.alpha": 0.2,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.facecolor": "none", "legend.edgecolor": "none",
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10, "axes.titlesize": 11,
    "svg.fonttype": "none", "svg.hashsalt": "plots",        # text stays text; the same figures, the same file
}


def check(out: str) -> None:
    """Raises ValueError where no picture can be made: an unknown suffix, no matplotlib."""
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{out}: a picture ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error


def draw(out: str, width: float, height: float, columns: int, fill) -> None:
    """Writes a picture of width x height inches; fill(axes, one per column) puts the content in."""
    import matplotlib
    from matplotlib.figure import Figure
    suffix = Path(out).suffix.lower()
    with matplotlib.rc_context(STYLE), atomic(out) as temporary:
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure.subplots(1, columns, squeeze=False)[0])
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)


def curves(panels: dict[str, dict[str, Sequence[tuple[float, float]]]], out: str, log_scale: bool) -> None:
    """A panel per figure, a line per run, of one colour in all: {title: {run: [(step, value), ...]}}."""
    runs = list(dict.fromkeys(name for lines in panels.values() for name in lines))

    def fill(axes):
        for ax, (title, lines) in zip(axes, panels.items()):
            for name, points in lines.items():
                colour = COLOURS[runs.index(name) % len(COLOURS)]
                ax.plot(*zip(*points), color=colour, label=name, linewidth=1.6)
            ax.set_title(title)
            ax.set_xlabel("step")
            if log_scale:
                ax.set_yscale("log")
        axes[0].legend()

    draw(out, 0.4 + 3.2 * len(panels), 2.8, len(panels), fill)


def bars(panels: Sequence[tuple[tuple[str, str, str], dict[str, Sequence[float]]]], out: str) -> None:
    """Stacked bars from 0 to 100 %. A panel: what its three shares are of, and {row: the shares}."""
    colours = (COLOURS[1], GREY, COLOURS[0])

    def fill(axes):
        for ax, (kinds, rows) in zip(axes, panels):
            left = [0.0] * len(rows)
            for index, kind in enumerate(kinds):
                percent = [100 * shares[index] for shares in rows.values()]
                drawn = ax.barh(list(rows), percent, 0.62, left=left, label=kind, color=colours[index])
                labels = [f"{p:.0f}" if p >= 4 else "" for p in percent]
                ax.bar_label(drawn, labels, label_type="center", color="white")
                left = [start + p for start, p in zip(left, percent)]
            ax.invert_yaxis()                               # the first row on top
            ax.set_xlim(0, 100)
            ax.set_xlabel("% of answers")
            ax.grid(visible=False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=1.2, handlelength=1)

    draw(out, 0.6 + 6.4 * len(panels), 2.2, len(panels), fill)
