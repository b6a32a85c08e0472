"""VBench's result files, its sixteen dimensions, and Quality, Semantic and Total as its leaderboard has them.

Sources: VBench's scripts/constant.py and cal_final_score.py; v1, Appendix C. Scores are shares 0..1; tables
print percent.
"""
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Dimension:
    """One of VBench's measures: heading in the papers' tables, range that becomes 0..1, weight."""
    title: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension("Subject Consist.", 0.1462, 1.0),
    "background_consistency": Dimension("BG Consist.", 0.2615, 1.0),
    "temporal_flickering": Dimension("Temporal Flicker.", 0.6293, 1.0),
    "motion_smoothness": Dimension("Motion Smooth.", 0.706, 0.9975),
    "aesthetic_quality": Dimension("Aesthetic Quality"),
    "dynamic_degree": Dimension("Dynamic Degree", weight=0.5),
    "imaging_quality": Dimension("Image Quality"),
}
SEMANTIC = {
    "object_class": Dimension("Object Class"),
    "multiple_objects": Dimension("Multiple Objects"),
    "human_action": Dimension("Human Action"),
    "color": Dimension("Color"),
    "spatial_relationship": Dimension("Spatial Relation."),
    "scene": Dimension("Scene", 0.0, 0.8222),
    "appearance_style": Dimension("Appear. Style", 0.0009, 0.2855),
    "temporal_style": Dimension("Temporal Style", 0.0, 0.364),
    "overall_consistency": Dimension("Overall Consist.", 0.0, 0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
TOTALS = ("Total", "Quality", "Semantic")

# Percent: Total, Quality, Semantic, the dimensions in the order above. Source: v1, Table 4; v2's tables.
PUBLISHED = {
    "VideoCrafter2, 50 steps": (80.44, 82.20, 73.42, 96.85, 98.22, 98.41, 97.73, 63.13, 42.50, 67.22,
                                92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23),
    "VCM (VC2), 4 steps": (73.97, 78.54, 55.66, 94.02, 96.05, 99.06, 98.84, 54.56, 42.50, 52.72,
                           63.97, 10.81, 82.60, 79.12, 23.06, 18.49, 25.29, 22.31, 25.15),
    "T2V-Turbo (VC2), 4 steps": (81.01, 82.57, 74.76, 96.28, 97.02, 97.48, 97.34, 63.04, 49.17, 72.49,
                                 93.96, 54.65, 95.20, 89.90, 38.67, 55.58, 24.42, 25.51, 28.16),
    "ModelScopeT2V, 50 steps": (75.75, 78.05, 66.54, 89.87, 95.29, 98.28, 95.79, 52.06, 66.39, 58.57,
                                82.25, 38.98, 92.40, 81.72, 33.68, 39.26, 23.39, 25.37, 25.67),
    "VCM (MS), 4 steps": (75.84, 78.80, 63.98, 93.06, 97.30, 98.51, 98.00, 48.99, 46.11, 61.98,
                          83.18, 24.85, 87.20, 85.72, 31.57, 42.44, 23.20, 23.30, 24.18),
    "T2V-Turbo (MS), 4 steps": (80.62, 82.15, 74.47, 94.82, 98.71, 97.99, 95.64, 60.04, 66.39, 68.09,
                                93.34, 58.63, 95.80, 89.67, 45.74, 48.47, 23.23, 25.92, 27.51),
    "T2V-Turbo-v2, 4 steps": (82.34,),
    "T2V-Turbo-v2, 8 steps": (83.05,),
    "T2V-Turbo-v2, 16 steps": (83.52, 85.13, 77.12),
    "T2V-Turbo-v2 without motion guidance, 16 steps": (82.93, 84.08, 78.33),
}


def published() -> dict[str, dict[str, float]]:
    """The papers' own rows, as `with_totals` returns one's own: {model: {column: share}}."""
    return {f"{name} (paper)": {column: percent / 100 for column, percent in zip((*TOTALS, *DIMENSIONS), row)}
            for name, row in PUBLISHED.items()}


# ---- totals ------------------------------------------------------------------------------------------------


def weighted_mean(scores: dict[str, float], group: dict[str, Dimension]) -> float | None:
    """Weighted mean of a group's scores, each scaled from its range to 0..1; None where one is missing."""
    if not all(name in scores for name in group):
        return None
    scaled = [d.weight * (scores[name] - d.low) / (d.high - d.low) for name, d in group.items()]
    return sum(scaled) / sum(d.weight for d in group.values())


def with_totals(scores: dict[str, float]) -> dict[str, float]:
    """Adds Quality, Semantic and Total (four fifths of it Quality) where their dimensions are complete."""
    quality, semantic = weighted_mean(scores, QUALITY), weighted_mean(scores, SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    totals = dict(zip(TOTALS, (total, quality, semantic)))
    return {name: value for name, value in totals.items() if value is not None} | scores


# ---- result files ------------------------------------------------------------------------------------------


def read_models(arguments: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{model: {dimension: share}} of a command line's PATH or NAME=PATH,PATH: files or folders of them.

    A path without NAME belongs to the model that its folder is called after. Files of one model are merged.
    """
    models: dict[str, dict[str, tuple[float, Path]]] = {}
    for argument in arguments:
        name, separator, paths = argument.partition("=")
        if Path(argument).exists() or not separator:
            name, paths = "", argument
        for path in map(Path, [paths] if Path(paths).exists() else paths.split(",")):
            folder = path if path.is_dir() else path.parent
            merge(models.setdefault(name or folder.resolve().name, {}), result_files(path))
    return {name: {dimension: share for dimension, (share, _) in found.items()}
            for name, found in models.items()}


def result_files(path: Path) -> list[Path]:
    """A result file itself, or those of a folder; VBench's *_full_info.json (its prompts) are no results."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    files = [file for file in files if not file.name.endswith("_full_info.json")]
    if path.is_dir() and not files:
        raise ValueError(f"{path}: no result files (*_eval_results.json) in this folder")
    return files


def merge(found: dict[str, tuple[float, Path]], files: list[Path]) -> None:
    """Adds the scores of more files to {dimension: (share, file)}. Raises ValueError where two contradict."""
    for file in files:
        for dimension, score in read_result(file).items():
            known, source = found.get(dimension, (score, file))
            if known != score:
                raise ValueError(f"{dimension} is {known:g} in {source} and {score:g} in {file}; "
                                 "tell two models apart with NAME=FILE")
            found[dimension] = score, source


def read_result(file: Path) -> dict[str, float]:
    """{dimension: share} of one of VBench's files, {dimension: [share, [single clips]]}."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: not a result file of VBench, which holds {{dimension: [score, clips]}}")

    scores = {}
    for name, value in content.items():
        dimension = name.replace(" ", "_").lower()
        score = value[0] if isinstance(value, list) and value else value
        if dimension not in DIMENSIONS:
            raise ValueError(f"{file}: unknown dimension {name!r}; VBench's are {', '.join(DIMENSIONS)}")
        if not isinstance(score, int | float) or not abs(score) <= 1:
            raise ValueError(f"{file}: {name} is {score!r:.40}; VBench writes shares, at most 1")
        scores[dimension] = float(score)
    return scores


def check_complete(models: dict[str, dict[str, float]]) -> None:
    """Raises ValueError that lists the missing dimensions: a total without them would mean nothing."""
    missing = {name: [d for d in DIMENSIONS if d not in scores] for name, scores in models.items()}
    lacks = [f"{name} lacks {', '.join(dimensions)}" for name, dimensions in missing.items() if dimensions]
    if lacks:
        raise ValueError("; ".join(lacks) + "; --partial prints what can be said without them")


# ---- tables ------------------------------------------------------------------------------------------------


def table(models: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
    """Markdown, a row per model, in percent, the best figure of a column bold. columns: {key: heading}."""
    def shown(row, key):
        return f"{100 * row[key]:.2f}" if key in row else "-"

    best = {}
    for key in columns:
        figures = [shown(row, key) for row in models.values() if key in row]
        best[key] = max(figures, key=float) if figures and len(models) > 1 else None

    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in models.items():
        cells = [f"**{best[key]}**" if shown(row, key) == best[key] else shown(row, key) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(models: dict[str, dict[str, float]], dimensions: bool) -> str:
    """The totals of models side by side; with dimensions, the papers' two tables: Quality and Semantic."""
    if not dimensions:
        return table(models, {name: name for name in TOTALS})
    parts = []
    for totals, group in ((("Total", "Quality"), QUALITY), (("Semantic",), SEMANTIC)):
        headings = {name: name for name in totals} | {name: d.title for name, d in group.items()}
        known = {name: row for name, row in models.items() if any(key in row for key in headings)}
        parts.append(table(known, headings))
    return "\n\n".join(parts)
