"""VBench's result files, its sixteen dimensions, and Quality, Semantic and Total as its leaderboard has them.

Sources: VBench's scripts/constant.py and cal_final_score.py; v1, Appendix C. Scores are shares 0..1; tables
print percent.
"""
import json
from pathlib import Path

from plumbing.errors import UserError, reading
from plumbing.stats import markdown

# {dimension: (heading, lower and upper end of the range that becomes 0..1, weight)}
QUALITY = {
    "subject_consistency": ("Subject Consist.", 0.1462, 1, 1),
    "background_consistency": ("BG Consist.", 0.2615, 1, 1),
    "temporal_flickering": ("Temporal Flicker.", 0.6293, 1, 1),
    "motion_smoothness": ("Motion Smooth.", 0.706, 0.9975, 1),
    "aesthetic_quality": ("Aesthetic Quality", 0, 1, 1),
    "dynamic_degree": ("Dynamic Degree", 0, 1, 0.5),
    "imaging_quality": ("Image Quality", 0, 1, 1),
}
SEMANTIC = {
    "object_class": ("Object Class", 0, 1, 1),
    "multiple_objects": ("Multiple Objects", 0, 1, 1),
    "human_action": ("Human Action", 0, 1, 1),
    "color": ("Color", 0, 1, 1),
    "spatial_relationship": ("Spatial Relation.", 0, 1, 1),
    "scene": ("Scene", 0, 0.8222, 1),
    "appearance_style": ("Appear. Style", 0.0009, 0.2855, 1),
    "temporal_style": ("Temporal Style", 0, 0.364, 1),
    "overall_consistency": ("Overall Consist.", 0, 0.364, 1),
}
DIMENSIONS = QUALITY | SEMANTIC
TOTALS = ("Total", "Quality", "Semantic")

# Percent: Total, Quality, Semantic, the dimensions in the order above; None: not printed. v1, Table 4; v2's
# tables; PISCES (arXiv 2602.01624); the other papers' own tables.
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
    "T2V-Turbo-v2, 4 steps": (82.34, 83.93, 75.97),
    "T2V-Turbo-v2, 8 steps": (83.05,),
    "T2V-Turbo-v2, 16 steps": (83.52, 85.13, 77.12),
    "T2V-Turbo-v2 without motion guidance, 4 steps": (81.87, 83.26, 76.30),
    "T2V-Turbo-v2 without motion guidance, 16 steps": (82.93, 84.08, 78.33),
    "PISCES, 4 steps": (82.51, 83.73, 77.63),
    "PISCES by GRPO, 4 steps": (82.75, 84.05, 77.54),
    "PISCES with motion guidance, 4 steps": (82.79, 84.12, 77.45),
    "PISCES with ViCLIP, 4 steps": (82.84, 84.18, 77.49),
    "Hummingbird 0.7 B": (81.35, 83.73),
    "VideoReward-DPO (VC2), 50 steps": (80.75,),
    "VideoDPO (VC2), 50 steps": (81.93,),
    "UnifiedReward (VC2), 50 steps": (81.43,),
    "NoisEasier (VC2), 4 steps": (*[None] * 8, 59.17, None, None, 79.18, None, 93.63, 52.61, None, None, None,
                                  31.95),
    "NoisEasier (MS), 4 steps": (*[None] * 11, 76.6),
    "best of n (MS), 4 steps": (*[None] * 11, 80.06),
}


def published() -> dict[str, dict[str, float]]:
    """The papers' rows, as `with_totals` returns one's own: {model: {column: share}}."""
    columns = (*TOTALS, *DIMENSIONS)
    return {f"{name} (paper)": {column: percent / 100 for column, percent in zip(columns, row) if percent}
            for name, row in PUBLISHED.items()}


def with_totals(scores: dict[str, float]) -> dict[str, float]:
    """Adds Quality, Semantic and Total (four fifths of it Quality) where their dimensions are complete."""
    totals = {}
    for title, group in (("Quality", QUALITY), ("Semantic", SEMANTIC)):
        if scores.keys() >= group.keys():
            scaled = [w * (scores[name] - low) / (high - low) for name, (_, low, high, w) in group.items()]
            totals[title] = sum(scaled) / sum(w for *_, w in group.values())
    if len(totals) == 2:
        totals["Total"] = (4 * totals["Quality"] + totals["Semantic"]) / 5
    return totals | scores


def read_model(name: str, paths: list[Path]) -> dict[str, float]:
    """{dimension: share} of a model's result files, or folders of them."""
    if name.removesuffix(" (paper)") in PUBLISHED:
        raise UserError(f"{name} is a paper's row; call your own model otherwise: NAME={paths[0]}")
    files = [file for path in paths
             for file in (sorted(path.glob("*_eval_results.json")) if path.is_dir() else [path])]
    scores = {}
    for file in files:
        with reading(file, "a VBench result"):              # {dimension: [share, [single clips]]}
            result = {dimension.replace(" ", "_").lower(): value[0]
                      for dimension, value in json.loads(file.read_text(encoding="utf-8")).items()}
        for dimension, share in result.items():
            if dimension not in DIMENSIONS:
                raise UserError(f"{file}: unknown dimension {dimension!r:.60}; VBench has "
                                f"{', '.join(DIMENSIONS)}")
            if type(share) not in (int, float) or not abs(share) <= 1:
                raise UserError(f"{file}: {dimension} is {share!r:.40}; VBench writes shares, at most 1")
            if scores.setdefault(dimension, share) != share:
                raise UserError(f"{file}: {dimension} is {share:g}, in another file of {name} "
                                f"{scores[dimension]:g}; tell two models apart with NAME=FILE")
    if not scores:
        raise UserError(f"{paths[0]}: no result files (*_eval_results.json) in this folder")
    return scores


def tables(models: dict[str, dict[str, float]]) -> str:
    """Totals, then dimensions as in the papers' tables, in percent; and what a model lacks for its total."""
    parts = []
    for group in ({total: (total,) for total in TOTALS}, QUALITY, SEMANTIC):
        rows = [[name, *(f"{100 * row[key]:.2f}" if key in row else "-" for key in group)]
                for name, row in models.items() if row.keys() & group.keys()]
        parts += [markdown(["", *(heading for heading, *_ in group.values())], rows)] if rows else []
    for name, row in models.items():
        missing = [dimension for dimension in DIMENSIONS if dimension not in row]
        if missing and not name.endswith(" (paper)"):
            parts.append(f"no Total of {name}, which lacks {', '.join(missing)}")
    return "\n\n".join(parts)
