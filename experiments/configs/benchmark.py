"""Our figures beside those of what people would use instead, as ratios.

    python experiments/benchmark.py --config=experiments/configs/benchmark.py:control --workdir=runs/benchmark

After the colon stands the work: decode, update, iteration, memory, compile, control. Twenty minutes each on two CPU
cores. Ratios are medians of rounds, in brackets the least and the largest.

Sampling beside torch transformers' `generate`, 32 + 64 tokens, tokens/s (2026-11-30, two cores, Python 3.11, jax
0.10.2, torch 2.13.0, transformers 5.24; two rounds; before matrices by output and the float32 cache, which took a step
of gpt2 at batch 16 from 79 to 65 ms, in bfloat16 from 68 to 48, and one of tiny at batch 64 in bfloat16 from 30 to 21):

| model, batch, dtype | ours | peer | times better | of the limit |
|---|---:|---:|---:|---:|
| gpt2, 16 / 32 / 64, float32 | 192 / 205 / 294 | 139 / 166 / 205 | 1.4 / 1.2 / 1.4 | 33 / 35 / 51 % |
| gpt2, 16 / 32 / 64, bfloat16 | 248 / 334 / 395 | 186 / 246 / 316 | 1.3 / 1.4 / 1.3 | 47 / 63 / 75 % |
| tiny, 16, float32 | 1,367 | 679 | 2.0 | 27 % |

A gradient step on the next-token loss beside torch's AdamW, 8 x 96 tokens, tokens/s (the same day and versions):

| model, dtype | ours | peer | times better | of the limit |
|---|---:|---:|---:|---:|
| tiny, float32 | 1,137 | 1,427 | 0.80 (0.74 to 0.86) | 46 % |
| tiny, bfloat16 | 1,090 | 2,221 | 0.50 (0.40 to 0.60) | 52 % |
| gpt2, float32 | 131 | 201 | 0.65 (0.64 to 0.66) | 47 % |
| gpt2, bfloat16 | 150 | 300 | 0.50 (0.49 to 0.51) | 64 % |

Iteration, memory and compile are not measured yet.

CartPole-v1 (2026-11-30, two slow cores, Python 3.11, jax 0.10.2, Stable-Baselines3 2.9.2, rejax 0.1.3; three rounds):

| CartPole-v1 | ours | peer | times better |
|---|---:|---:|---:|
| Stable-Baselines3, its settings, steps/s | 29,400 | 748 | 37 (30 to 41) |
| the same, 64 agents in one program | 40,800 | 807 | 58 (46 to 66) |
| Stable-Baselines3, settings of rl-zoo3, steps/s | 25,000 | 3,270 | 8.3 (7.5 to 11) |
| rejax, settings of rl-zoo3, steps/s | 28,700 | 27,800 | 1.03 (1.01 to 1.10) |
| rejax, its settings, steps/s | 72,600 | 68,400 | 1.09 (0.92 to 1.17) |
| 10,240 steps, compiled; Stable-Baselines3, s | 0.28 | 8.0 | 29 (20 to 34); return 500 against 430 |
| solved, compiling included; Stable-Baselines3 with rl-zoo3's, s | 5.2, 6.4 | 3.5, 3.8 | 0.66, 0.76 (two seeds) |
| the same; rejax with rl-zoo3's, s | 6.2, 6.8 | 8.9, 8.7 | 1.41, 1.28 (two seeds) |

(The first three before a shuffle of more than 1,625 rows took one sort instead of two.)

Many agents are no faster than one where a gradient step fills the machine already.
"""

import ml_collections

from experiments.settings import BenchmarkExperiment, defaults


def get_config(work: str = "control") -> ml_collections.ConfigDict:
    """The settings of one work."""
    config = defaults(BenchmarkExperiment)
    config.work = work
    config.rounds = 3
    return config
