"""The embedded toy: a world whose clips a program draws, and small models trained on it; see README.md."""
from importlib import import_module
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
STUDENTS = ("vcm", "turbo")             # the embedded ones
NEEDS_TORCH = {"Clips": "world", "accuracy": "world"} | dict.fromkeys(
    ("FAMILIES", "FILES", "SAMPLING", "load", "load_text", "load_vae", "read", "reward", "rewards"), "models")


def __getattr__(name: str):
    """Imports what needs torch when it is first asked for, so that `import shapes` takes no time."""
    if name not in NEEDS_TORCH:
        raise AttributeError(f"module 'shapes' has no attribute {name!r}")
    return getattr(import_module(f"shapes.{NEEDS_TORCH[name]}"), name)


def student(name: str, folder: str | Path | None = None) -> Path:
    """The file of a student: embedded, or where `train.py --out FOLDER/NAME` wrote it."""
    places = [Path(folder or WEIGHTS) / path for path in (f"{name}.safetensors", f"{name}/turbo.safetensors")]
    return next((path for path in places if path.exists()), places[0])
