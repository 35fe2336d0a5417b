"""The one error of this package."""

from ppo_jax.errors import InputError


class HubError(InputError):
    """A model folder, or a name of one, that cannot be used. The message is one line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        """Folds line breaks away: folders come from strangers."""
        super().__init__(" ".join(str(message).split()))
