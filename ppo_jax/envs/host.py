"""Any environment of Gymnasium, through its vector API, on the host."""

from typing import Any

import numpy as np

from ppo_jax.envs.environment import Box, Discrete
from ppo_jax.errors import InputError, check


class HostEnvironments:
    """N environments of a name side by side; one that ends begins anew in the same step.

    `observation_size`, `actions` and `solved_at` (None where Gymnasium knows none) are as of an `Environment`.
    """

    def __init__(self, name: str, num_envs: int, seed: int) -> None:
        """Makes the environments, and resets them.

        Raises:
            InputError: gymnasium is not installed, nothing has this name, or the spaces are not numbers in a row.
        """
        try:
            import gymnasium
            from gymnasium.vector import AutoresetMode
        except ImportError as error:
            raise InputError(f"env: gym:{name} needs gymnasium: pip install 'ppo_jax[control]'") from error
        modes = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
        try:
            self._envs = gymnasium.make_vec(name, num_envs=num_envs, **modes)
        except (gymnasium.error.Error, ImportError) as error:
            raise InputError(f"env: gym:{name}: {error}") from error
        seen, actions = self._envs.single_observation_space, self._envs.single_action_space
        row = isinstance(seen, gymnasium.spaces.Box) and len(seen.shape) == 1
        check(f"env: gym:{name}: observations", seen, row, "a Box of one dimension")
        self.actions = _space(name, gymnasium.spaces, actions)
        self._shift = int(actions.start) if isinstance(actions, gymnasium.spaces.Discrete) else 0
        self.solved_at = self._envs.spec.reward_threshold if self._envs.spec else None
        self.reset(seed)
        self.observation_size = self.observations.shape[1]

    def reset(self, seed: int) -> None:
        """Begins all episodes anew."""
        self.observations = np.asarray(self._envs.reset(seed=seed)[0], np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One action in each environment; `observations` are those of the next action afterwards.

        Args:
            actions: `[N]` int32 or `[N, A]` float32.

        Returns:
            (rewards `[N]`, terminated `[N]` bool, truncated `[N]` bool, observations `[N, D]` that were reached, before
            any reset).
        """
        observations, rewards, terminated, truncated, told = self._envs.step(actions + self._shift)
        reached = np.array(observations, np.float32)
        for i in np.flatnonzero(terminated | truncated):
            reached[i] = told["final_obs"][i]
        self.observations = np.asarray(observations, np.float32)
        return np.asarray(rewards, np.float32), terminated, truncated, reached

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()


def _space(name: str, spaces: Any, space: Any) -> Discrete | Box:
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    fits = isinstance(space, spaces.Box) and len(space.shape) == 1 and space.is_bounded()
    check(f"env: gym:{name}: actions", space, fits, "Discrete, or a bounded Box of one dimension")
    return Box(tuple(space.low.tolist()), tuple(space.high.tolist()))
