"""What the stages left in the workdir, read with patience."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.errors import check
from ppo_jax.metrics import read_jsonl
from ppo_jax.plots.style import number

Row = Mapping[str, Any]

STAGES = {  # folder -> words
    "corpus": "corpus",
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "prompts": "prompts",
    "feedback": "feedback",
    "reward_model": "reward model",
    "ppo": "PPO",
    "evaluation": "evaluation",
}


class Findings:
    """The files that the report is made of; what is missing is empty, what cannot be read is empty and in `damaged`.

    Args:
        workdir: of the whole road.
        summary: what stands in summary.json.
        stages: folders of the stages that belong to this road; others are not read. None: those that are there.
    """

    def __init__(self, workdir: Path, summary: Row, stages: Iterable[str] | None):
        self.workdir, self.summary = workdir, summary
        there = (stage for stage in STAGES if (workdir / stage).is_dir())
        self.stages = tuple(there if stages is None else stages)
        self.damaged: list[str] = []
        self.configs = {stage: self._read(stage, "config.json", _json_object, {}) for stage in self.stages}
        self.reward_model = self._read("reward_model", "results.json", _json_object, {})
        self.ppo = self._read("ppo", "metrics.jsonl", read_jsonl, [])
        self.best_of_n = self._read("evaluation", "best_of_n.jsonl", read_jsonl, [])
        self.responses = self._read("evaluation", "responses.jsonl", read_jsonl, [])
        self.curves = {stage: self._read(stage, "curves.png", _png, b"") for stage in self.stages}
        self.kl_limit = number(self.configs.get("ppo", {}).get("kl_limit"))  # nats a response

    def value(self, key: str) -> float:
        """A number of the summary, or NaN."""
        return number(self.summary.get(key))

    @property
    def ceiling(self) -> float:
        """Accuracy that knowing the simulated annotator's mind would give; NaN where no annotator was simulated."""
        return self.value("reward_model/annotator_ceiling")

    def _read(self, stage: str, name: str, read: Callable[[Path], Any], nothing: Any) -> Any:
        path = self.workdir / stage / name
        if stage not in self.stages or not path.exists():
            return nothing
        try:
            return read(path)
        except (OSError, ValueError) as error:
            self.damaged.append(f"{stage}/{name} cannot be read and is left out: {error}")
            return nothing


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    check("content", type(value).__name__, isinstance(value, dict), "a JSON object")
    return value


def _png(path: Path) -> bytes:
    data = path.read_bytes()
    check("its first bytes", data[:8], data.startswith(b"\x89PNG\r\n\x1a\n"), "those of a PNG")
    return data
