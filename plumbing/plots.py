"""Pictures of figures, by matplotlib: curves of training runs, bars of votes. Transparent, in colours that read on white and on black."""
from collections.abc import Sequence
from pathlib import Path

from plumbing.files import atomic

SUFFIXES = (".svg", ".png", ".pdf")
COLOURS = ("#3b82d6", "#e0592a", "#2f9e5b", "#a35fd0", "#c98a12", "#12a3b4", "#d64a8a", "#8a7a5c")
GREY = "#7d8691"                                            # of text and axes: contrast above 3.6 on white and on black
STYLE = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.titlecolor": GREY, "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "legend.facecolor": "none", "legend.edgecolor": "none", "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11,
    "svg.fonttype": "none", "svg.hashsalt": "plots",        # text stays text; the same figures give the same file
}


def check(out: str) -> None:
    """Raises ValueError where no picture can be made: an unknown suffix, no matplotlib."""
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{out}: a picture ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib, which is not installed: pip install matplotlib") from error


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


def curves(panels: dict[str, dict[str, Sequence[tuple[float, float]]]], out: str, log_scale: bool = False) -> None:
    """A panel per figure, a line per run: {title: {run: [(step, value), ...]}}. A run has one colour in all panels."""
    runs = list(dict.fromkeys(name for lines in panels.values() for name in lines))

    def fill(axes):
        for ax, (title, lines) in zip(axes, panels.items()):
            for name, points in lines.items():
                ax.plot(*zip(*points), color=COLOURS[runs.index(name) % len(COLOURS)], label=name, linewidth=1.6)
            ax.set_title(title)
            ax.set_xlabel("step")
            if log_scale:
                ax.set_yscale("log")
        axes[0].legend()

    draw(out, 0.4 + 3.2 * len(panels), 2.8, len(panels), fill)


def bars(panels: dict[str, dict[str, Sequence[float]]], kinds: dict[str, Sequence[str]], out: str) -> None:
    """Stacked horizontal bars that fill 0 to 100 %: {title: {row: shares}}, and per title what the shares are of."""
    def fill(axes):
        for ax, (title, rows) in zip(axes, panels.items()):
            labels = list(rows)
            left = [0.0] * len(labels)
            for index, kind in enumerate(kinds[title]):
                shares = [100 * rows[label][index] for label in labels]
                colour = (COLOURS[1], GREY, COLOURS[0])[index]
                drawn = ax.barh(labels, shares, 0.62, left=left, color=colour, label=kind, alpha=0.55 if colour == GREY else 1)
                ax.bar_label(drawn, [f"{s:.0f}" if s >= 4 else "" for s in shares], label_type="center", color="white")
                left = [a + b for a, b in zip(left, shares)]
            ax.invert_yaxis()
            ax.set_xlim(0, 100)
            ax.set_xlabel("% of answers")
            ax.grid(visible=False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1.2, handlelength=1)

    draw(out, 0.6 + 5.4 * len(panels), 2.6, len(panels), fill)
