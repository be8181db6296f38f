"""What a number rests on, so that it can be compared with another: printed with every evaluation."""

from typing import Any

import mmdiff
from mmdiff.evaluation.task import Task


def protocol(task: Task) -> dict[str, Any]:
    """What was measured and how, as JSON: call it when the metrics have been measured.

    `generated`, `real` and `image_sizes` are of the sets that are compared, where any are; images of both are uint8.
    `features`: hash, width and resizing of each extractor.
    """
    found: dict[str, Any] = {"mmdiff": mmdiff.__version__, "config": task.model.cfg.fingerprint()}
    found |= {"count": task.count, "seed": task.seed, "split": task.comparison.split}
    if "generated" in task.__dict__:  # was drawn
        sizes = sorted({(d.image.height, d.image.width) for d in task.wanted})
        found |= {"generated": len(task.generated), "real": len(task.wanted), "pixels": "uint8"}
        found["prompts"] = "of the real images" if task.model.cfg.layout.markers else "none"
        found["image_sizes"] = [f"{height}x{width}" for height, width in sizes[:8]] + ["..."] * (len(sizes) > 8)
    if task.reconstructs:
        found |= {"quantizer": task.model.cfg.tokenizer.quantizer, "codes": task.model.network.length}
    else:
        options = task.model.options(**task.drawing)
        heeded = task.model.path.HEEDED
        found |= {name: getattr(options, name) for name in ("solver", "steps", "grid", "guidance") if name in heeded}
    return found | task.notes


def lines(found: dict[str, Any]) -> str:
    """The protocol for people, a line for the whole and one for each extractor and warning."""
    plain = [f"{name} {_words(value)}" for name, value in found.items() if name not in ("features", "warnings", "ode")]
    said = ["protocol: " + ", ".join(plain)]
    for name, value in found.get("features", {}).items():
        said.append(f"features {name}: " + ", ".join(f"{key} {word}" for key, word in value.items()))
    if "ode" in found:
        said.append("ode: " + ", ".join(f"{key} {word}" for key, word in found["ode"].items()))
    return "\n".join(said)


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
