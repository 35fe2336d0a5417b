"""Settings of collecting feedback from people."""

import dataclasses

from experiments.settings.machinery import check_at_least
from ppo_jax.config import option
from ppo_jax.data import LONG_PROMPTS
from ppo_jax.errors import check
from ppo_jax.feedback.formats import EXPORTS
from ppo_jax.feedback.page import check_access

KINDS = ("auto", "compare", "rank", "score")


@dataclasses.dataclass(frozen=True)
class FeedbackExperiment:
    """Settings of `experiments/collect_feedback.py`. What is judged comes from a model, from given responses, from
    judgements that exist already, or from several of these.
    """

    model: str = option("", "whose responses to prompts are judged: a Hugging Face folder, or a name on the hub")
    prompts: str = option("", "for the model, JSONL, Parquet or a Hugging Face dataset: prompt, messages or text")
    prompts_split: str = option("train", "split of a Hugging Face dataset")
    num_prompts: int = option(0, "the first so many prompts that fit; 0: all")
    num_responses: int = option(2, "responses that are sampled to each prompt")
    prompt_length: int = option(64, "longest prompt, in tokens")
    long_prompts: str = option("drop", "prompts longer than prompt_length: " + ", ".join(LONG_PROMPTS))
    response_length: int = option(48, "longest response, in tokens")
    temperature: float = option(1.0, "of the sampling")
    batch_size: int = option(64, "responses that are sampled at a time")
    seed: int = option(0, "of the sampling")
    dtype: str = option("float32", "of the model's matrix products: float32 or bfloat16")
    pad_token: str = option("", "overrides the tokenizer's")
    eos_token: str = option("", "overrides the tokenizer's")
    responses: str = option("", "given responses to judge, in the same kinds of files: prompt and completions (a list)")
    responses_split: str = option("train", "split of a Hugging Face dataset")
    judged: str = option("", "judgements to begin with: a file of pairs, rankings, choices or scores")
    kind: str = option(
        "auto",
        "what is asked: compare (the better of 2), rank (all of a prompt), score (each alone), or auto: of a prompt's "
        "responses 1 is scored, 2 are compared, more are ranked",
    )
    scale: int = option(5, "best score; 1 is the worst")
    overlap: float = option(0.0, "share of the items that several annotators judge, to measure how far they agree")
    annotators: int = option(2, "how many judge an item of that share")
    host: str = option("127.0.0.1", "address that the page is served at")
    port: int = option(8000, "port of the page; 0: any that is free")
    token: str = option("", "what people need to enter the page; demanded for another address than this machine's own")
    until_complete: bool = option(False, "end when everything is judged; otherwise with Ctrl-C")
    export: str = option("pairs", "what is written at the end, separated by commas: " + ", ".join(EXPORTS))

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("long_prompts", self.long_prompts, self.long_prompts in LONG_PROMPTS, "one of " + ", ".join(LONG_PROMPTS))
        check("kind", self.kind, self.kind in KINDS, "one of " + ", ".join(KINDS))
        check("overlap", self.overlap, 0 <= self.overlap <= 1, "a number in [0, 1]")
        check("temperature", self.temperature, 0 < self.temperature < float("inf"), "a number above 0")
        check("port", self.port, 0 <= self.port <= 65535, "0 to 65535")
        check("scale", self.scale, 2 <= self.scale <= 100, "2 to 100")
        check_at_least(self, 1, "num_responses prompt_length response_length batch_size annotators")
        check_at_least(self, 0, "num_prompts seed")
        compares = self.kind != "compare" or self.num_responses == 2
        check("num_responses", self.num_responses, compares, "2, with kind=compare; kind=rank takes more")
        ranks = self.kind != "rank" or self.num_responses >= 2
        check("num_responses", self.num_responses, ranks, "at least 2, with kind=rank")
        for name in export_names(self.export):
            check("export", name, name in EXPORTS, "some of " + ", ".join(EXPORTS))
        check_access(self.host, self.token)


def export_names(export: str) -> list[str]:
    """The formats of a list that is separated by commas."""
    return list(filter(None, (name.strip() for name in export.split(","))))
