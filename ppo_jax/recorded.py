"""What judges on the host have said, on disk: a run that is killed and goes on asks for no batch of scores twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.fingerprints import digest_of
from ppo_jax.metrics import JsonlWriter, read_jsonl
from ppo_jax.rewards import HostReward, Judges, call_reward


class Recorder:
    """Scores by what was asked, in a JSON Lines file: `{"asked": SHA-256, "scores": [...]}`.

    A killed run draws the same responses again, to the bit, and finds their scores here: a judge that costs money or
    minutes is paid once, and one that would answer differently the second time changes nothing.

    To be used in a `with`, which closes the file.
    """

    def __init__(self, path: Path, who: Any = None) -> None:
        """Reads what is there.

        Args:
            path: the file.
            who: whose words they are, as JSON can hold it: what others said is not taken for them.

        Raises:
            InputError: the file is damaged; names the line.
        """
        self._path, self._who = path, who
        self._file: JsonlWriter | None = None
        self._known = {row["asked"]: row["scores"] for row in read_jsonl(path)} if path.exists() else {}

    def reward(self, reward: HostReward, name: str) -> HostReward:
        """The same judge, asked only what is not known. What fails is not recorded."""

        def recorded(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
            asked = digest_of([self._who, name, list(prompts), list(completions), columns])
            if asked in self._known:
                return self._known[asked]
            rows = [{key: values[i] for key, values in columns.items()} for i in range(len(prompts))]
            scores = call_reward(reward, prompts, completions, rows).tolist()
            self._write({"asked": asked, "scores": scores})
            return scores

        recorded.__name__ = getattr(reward, "__name__", name)
        return recorded

    def judges(self, judges: Judges) -> Judges:
        """The same judges; those in JAX are left as they are."""
        members = [
            member if member.host is None else member._replace(host=self.reward(member.host, name))
            for name, member in zip(judges.names, judges.members, strict=True)
        ]
        return judges._replace(members=tuple(members))

    def __enter__(self) -> "Recorder":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file = self._file or JsonlWriter(self._path)  # no file where no judge is on the host
        self._file.write(row)
