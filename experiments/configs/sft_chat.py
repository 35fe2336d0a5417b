"""Supervised fine-tuning on conversations: the answers of the assistant are learned, what they answer is only read.

    pip install -e ".[data]"
    python experiments/train_sft.py --config=experiments/configs/sft_chat.py --workdir=runs/sft_chat

SmolLM2-135M-Instruct on the 9,500 conversations of No Robots, up to four passes; training stops when the loss on the
500 held-out ones has not fallen three times in a row, and exports the best model. For a GPU; not yet run there.

Offline: `--config.model=FOLDER --config.data=CHATS.jsonl --config.heldout=`, each row `{"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}]}`, or `{"prompt": [...], "completion": [...]}` with such
lists. The model's tokenizer needs a chat template.
"""

import ml_collections

from experiments.settings import SFTExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(SFTExperiment)
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data = "HuggingFaceH4/no_robots"
    config.heldout = "HuggingFaceH4/no_robots"
    config.length = 1024
    config.pack = True
    config.batch_size = 16
    config.accumulation = 4
    config.num_steps = 800
    config.lr = 2e-5
    config.weight_decay = 0.01
    config.warmup_steps = 40
    config.eval_every = 50
    config.checkpoint_every = 100
    config.patience = 3
    return config
