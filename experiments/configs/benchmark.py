"""Our figures beside those of what people would use instead, as ratios.

    python experiments/benchmark.py --config=experiments/configs/benchmark.py:control --workdir=runs/benchmark

After the colon stands the work: decode, update, iteration, memory, compile, control. Twenty minutes each on two CPU
cores. Ratios are medians of rounds, in brackets the least and the largest.

All on 2026-11-30, two cores, Python 3.11, jax 0.10.2, torch 2.13.0, transformers 5.24, two rounds each. Machines of
this kind differ, the ratios too: (a) AVX-512, float32 products at 290 GFLOP/s; (b) the same with bfloat16, at 210.

Sampling beside torch transformers' `generate`, 32 + 64 tokens, tokens/s:

| model, batch, dtype | ours | peer | times better | of the limit |
|---|---:|---:|---:|---:|
| gpt2, 16, float32 (b) | 345 | 132 | 2.62 (2.52 to 2.71) | 61 % |
| gpt2, 16, bfloat16 (a, earlier) | 275 | 191 | 1.44 (1.43 to 1.45) | 35 % |
| tiny, 16, float32 (b) | 2,002 | 871 | 2.30 (2.28 to 2.31) | 41 % |
| tiny, 64, float32 (a, earlier) | 2,546 | 1,610 | 1.58 (1.56 to 1.61) | 32 % |

Earlier: before products by output stayed so (`product_by_output`). A step of gpt2 at batch 16 took 36 ms on (b) when
nothing else ran, of which products and the reading of weights and cache take 33.

A gradient step on the next-token loss beside torch's AdamW, 8 x 96 tokens, tokens/s (a; in bfloat16 before `remat`):

| model, dtype | ours | peer | times better | of the limit |
|---|---:|---:|---:|---:|
| tiny, float32 | 1,898 | 2,356 | 0.81 (0.79 to 0.82) | 52 % |
| tiny, bfloat16 | 1,401 | 1,348 | 1.04 (1.02 to 1.04) | 45 % |
| gpt2, float32 | 235 | 282 | 0.83 (0.83 to 0.84) | 58 % |
| gpt2, bfloat16 | 169 | 166 | 1.02 | 48 % |

A step of ours also clips by the global norm and computes the logits twice, so that they are never held. In float32 for
gpt2, before the three changes that brought it from 4.0 to 3.3 s: of 3.6 s, products took 2.7, Adam and the clip 0.2,
the sums over the vocabulary 0.2.

An iteration, 32 + 48 tokens, four epochs, minibatches of 16, float32, beside the last PPOTrainer of TRL (1.12); TRL's
critic is separate. On (b) the first iteration, compiling included, takes 25 s, with a separate critic 40 s. Memory is
the peak of the whole process; gpt2 was measured once, before `remat`:

| model, batch, critic | ours | TRL | times better | memory, GB: ours, TRL | of the limit |
|---|---:|---:|---:|---:|---:|
| tiny, 64, shared (b) | 13.5 s | 28.6 s | 2.12 (2.07 to 2.17) | 1.09, 2.69 | 68 % |
| tiny, 64, separate (b) | 23.3 s | 28.3 s | 1.21 (1.20 to 1.22) | 1.40, 2.67 | 68 % |
| gpt2, 16, shared (a) | 25.0 s | 49.6 s | 1.98 | 5.0, 11.0 | |

A `--dry_run`'s figure is within 0.1 % of what the first two needed.

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
