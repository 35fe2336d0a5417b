"""Settings of the scripts that ask a policy: its evaluation, and the best of n of its responses."""

import dataclasses

from experiments.settings.machinery import check_at_least
from ppo_jax.config import option
from ppo_jax.data import LONG_PROMPTS
from ppo_jax.errors import check
from ppo_jax.feedback.page import check_access

REFERENCES = "references"
PAGE = "page"


@dataclasses.dataclass(frozen=True)
class AskingSettings:
    """What all scripts have in common that ask a policy."""

    prompts: str = option("", "a JSONL or Parquet file or a Hugging Face dataset: prompt, messages or text")
    prompts_split: str = option("train", "split of a Hugging Face dataset")
    num_prompts: int = option(256, "the first so many prompts that fit; 0: all")
    long_prompts: str = option("drop", "prompts longer than prompt_length: " + ", ".join(LONG_PROMPTS))
    prompt_length: int = option(64, "longest prompt, in tokens")
    response_length: int = option(48, "longest response, in tokens")
    temperature: float = option(1.0, "of the sampling; 0: greedy")
    batch_size: int = option(64, "responses that are sampled at a time")
    seed: int = option(0, "of the sampling and the bootstrap")
    dtype: str = option("float32", "of the model's matrix products: float32 or bfloat16")
    pad_token: str = option("", "overrides the tokenizer's")
    eos_token: str = option("", "overrides the tokenizer's")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("long_prompts", self.long_prompts, self.long_prompts in LONG_PROMPTS, "one of " + ", ".join(LONG_PROMPTS))
        check("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("num_prompts", self.num_prompts, self.num_prompts == 0 or self.num_prompts >= 2, "0 (all) or at least 2")
        check_at_least(self, 1, "prompt_length response_length batch_size")
        check_at_least(self, 0, "seed")
        check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more")


@dataclasses.dataclass(frozen=True)
class EvaluateExperiment(AskingSettings):
    """Settings of `experiments/evaluate.py`."""

    policy: str = option("", "the policy: a Hugging Face folder, or a name on the hub")
    against: str = option(
        "", "what it is compared with: another policy; or references, the data's column references or completion"
    )
    judge: str = option(
        "",
        "vader, model:FOLDER (a reward model), FILE.py:function or package.module:function; or page: people, blind, "
        "who choose the better of the two responses",
    )
    language: str = option("", "code of the references' language, for BLEU's tokenizer; empty: by their script")
    annotators: int = option(1, "people who judge each pair on the page")
    host: str = option("127.0.0.1", "address that the page is served at")
    port: int = option(8000, "port of the page; 0: any that is free")
    token: str = option("", "what people need to enter the page; demanded for another address than this machine's own")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        super().__post_init__()
        check("port", self.port, 0 <= self.port <= 65535, "0 to 65535")
        check_at_least(self, 1, "annotators")
        needs = "another policy or references, which the page compares with"
        check("against", self.against, bool(self.against) or self.judge != PAGE, needs)
        check_access(self.host, self.token)


@dataclasses.dataclass(frozen=True)
class BestOfNExperiment(AskingSettings):
    """Settings of `experiments/best_of_n.py`."""

    model: str = option("", "the policy: a Hugging Face folder, or a name on the hub")
    reward: str = option(
        "", "the judge that chooses: vader, model:FOLDER (a reward model), FILE.py:function or package.module:function"
    )
    gold: str = option("", "a second judge, that says what the choice is worth; empty: none")
    n: str = option("1,2,4,8,16", "how many to choose from; numbers that divide the largest, separated by commas")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        super().__post_init__()
        check("temperature", self.temperature, self.temperature > 0, "a number above 0: greedy responses are all equal")
        names = [name.strip() for name in self.n.split(",")]
        numbers = [int(name) for name in names if name.isdecimal() and int(name) > 0]
        fits = len(numbers) == len(names) and max(numbers) > 1 and all(max(numbers) % n == 0 for n in numbers)
        check(
            "n", self.n, fits, "whole numbers above 0, separated by commas, that divide the largest, which is above 1"
        )

    @property
    def sizes(self) -> list[int]:
        """The numbers in `n`, rising, each once."""
        return sorted({int(name) for name in self.n.split(",")})
