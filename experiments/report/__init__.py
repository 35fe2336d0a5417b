"""The report of a whole road: what each stage reached, as report.md and report.html in the workdir.

`write_report` reads the files that the stages left; what is missing, empty or damaged costs its part of the report and
is told in a sentence. The HTML is one file (pictures inside, no script, nothing from elsewhere); the Markdown shows the
pictures of `report/` and of the stages. What models wrote is shown as text in both.
"""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.report import sections
from experiments.report.road import STAGES, Findings
from experiments.report.text import HTML, MARKDOWN
from experiments.report.verdicts import verdicts
from ppo_jax import __version__
from ppo_jax.metrics import atomic_write

__all__ = ["STAGES", "write_report"]

_PACKAGES = ("jax", "flax", "optax", "numpy", "transformers")


def write_report(workdir: Path, summary: Mapping[str, Any], stages: Iterable[str] | None = None) -> None:
    """Writes report.md, report.html and the pictures in report/.

    Args:
        workdir: of the whole road, with the folders of its stages (`STAGES`).
        summary: what stands in summary.json; a value that is not known is None.
        stages: folders of the stages that belong to this road; others are not read. None: those that are there.
    """
    (workdir / "report").mkdir(parents=True, exist_ok=True)
    road = Findings(workdir, summary, stages)
    versions = {"Python": platform.python_version(), "ppo_jax": __version__}
    versions |= {name: version(name) for name in _PACKAGES}
    page = {
        "title": f"Report: {workdir.resolve().name}",
        "lead": sections.lead(road),
        "verdicts": verdicts(road),
        "sections": sections.all_sections(road),
        "damaged": road.damaged,
        "footer": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    atomic_write(workdir / "report.md", MARKDOWN.render(page).encode())
    atomic_write(workdir / "report.html", HTML.render(page).encode())
