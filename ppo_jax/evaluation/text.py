"""Responses against references: BLEU and ROUGE, by the packages that everyone reports them with (extra `eval`)."""

import importlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import regex

from ppo_jax.errors import InputError, check

BLEU_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"} | dict.fromkeys(("th", "lo", "km", "my"), "char")
"""sacrebleu's tokenizer by language; 13a (that of the WMT shared tasks) for all others."""

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_LETTER = r"[\p{L}\p{N}]"
# Scripts that put no spaces between words.
_SINGLE = rf"[{_LETTER}&&[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}]]"
_WORDS = regex.compile(rf"{_SINGLE}\p{{M}}*|(?:[{_LETTER}--{_SINGLE}]\p{{M}}*)+", regex.V1)
# Marks of direction, joiners and soft hyphens stand within words; a zero-width space separates them.
_INVISIBLE = regex.compile(r"[\p{Cf}--\u200b]", regex.V1)
_SCRIPTS = {
    "zh": regex.compile(r"[\p{L}&&\p{Han}]", regex.V1),
    "char": regex.compile(rf"[\p{{L}}&&{_SINGLE}--\p{{Han}}]", regex.V1),
    "13a": regex.compile(rf"[\p{{L}}--{_SINGLE}]", regex.V1),
}


class Bleu(NamedTuple):
    """Corpus BLEU and how it was computed."""

    score: float  # 0 to 100
    signature: str  # sacrebleu's: number of references, case, tokenizer, smoothing, version


def bleu(responses: Sequence[str], references: Sequence[Sequence[str]], language: str = "") -> Bleu:
    """Corpus BLEU by sacrebleu.

    Args:
        responses: n texts, n >= 1.
        references: for each response one or more texts.
        language: code of the references' language ("de", "zh", "zh-TW"), which chooses the tokenizer; "": by the script
            that most letters of the references have, which tells Chinese (zh), others without spaces between words
            (char) and all the rest (13a).

    Raises:
        InputError: a package is missing; different numbers of responses and references; no reference; no such code.

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation"; Post 2018,
        arXiv:1804.08771 (sacrebleu and its signature).
    """
    _check_rows(responses, references)
    sacrebleu = _import("sacrebleu", "BLEU")
    try:
        # force: without it, a log advises against texts that look tokenized, which a model's may well do.
        metric = sacrebleu.BLEU(tokenize=_bleu_tokenizer(references, language), force=True)
    except RuntimeError as error:  # MeCab, an extra of sacrebleu, for Japanese and Korean
        raise InputError(f"language: got {language!r}: {' '.join(str(error).split())}") from error
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    return Bleu(float(metric.corpus_score(list(responses), columns).score), str(metric.get_signature()))


def rouge(responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L by rouge-score, without stemming, over words of all scripts (`split_words`).

    On ASCII text the numbers are those of rouge-score's own tokenizer, which keeps nothing else.

    Args:
        responses: n texts, n >= 1.
        references: for each response one or more texts, of which the one that gives the best F-measure counts.

    Returns:
        `rouge1`, `rouge2`, `rougeL`: mean F-measure, 0 to 1.

    Raises:
        InputError: the package is missing; different numbers of responses and references; no reference.

    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    _check_rows(responses, references)
    scorer = _import("rouge_score.rouge_scorer", "ROUGE").RougeScorer(ROUGE_TYPES, tokenizer=_Words())
    scores = [scorer.score_multi(row, response) for row, response in zip(references, responses, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE_TYPES}


def split_words(text: str) -> list[str]:
    """Words of any script, case folded, without punctuation and symbols.

    A word is a run of letters and digits with the marks upon them (Unicode categories L, N, M). Where a script puts no
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter is a word. Composed and decomposed
    letters are the same.
    """
    return _WORDS.findall(unicodedata.normalize("NFC", _INVISIBLE.sub("", text.casefold())))


class _Words:
    """What rouge-score expects of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _bleu_tokenizer(references: Sequence[Sequence[str]], language: str) -> str:
    if not language:
        text = " ".join(text for row in references for text in row)
        letters = {name: len(letter.findall(text)) for name, letter in _SCRIPTS.items()}
        return max(("13a", "zh", "char"), key=letters.__getitem__)
    code = regex.split("[-_]", language.lower())[0]
    check("language", language, bool(regex.fullmatch("[a-z]{2,3}", code)), 'a code such as "de" or "zh"')
    return BLEU_TOKENIZERS.get(code, "13a")


def _import(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'{what} needs the "eval" extra: pip install -e ".[eval]"') from error


def _check_rows(responses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    check("responses", len(responses), len(responses) >= 1, "at least 1")
    check("references", len(references), len(references) == len(responses), f"{len(responses)}, a list a response")
    for number, row in enumerate(references, start=1):
        # A text is a sequence of texts too: each of its characters would be a reference.
        check(f"references of response {number}", row, not isinstance(row, str) and len(row) >= 1, "a list of texts")
