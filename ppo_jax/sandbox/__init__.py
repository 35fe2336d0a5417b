"""Where code that nobody has read is run: `host.py` starts and watches, `guest.py` is what runs inside."""

from ppo_jax.sandbox.host import Limits, Result, SandboxError, find_python, run

__all__ = ["Limits", "Result", "SandboxError", "find_python", "run"]
