"""PPO fine-tuning (RLHF) of causal language models in JAX: one compiled, mesh-sharded train step over a Flax model."""

import os

__version__ = "0.1.0"

# transformers serves tokenizers here, and would advise at each start that its torch models are missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
