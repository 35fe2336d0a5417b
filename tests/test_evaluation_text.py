"""BLEU and ROUGE: goldens, the packages' own numbers on plain text, and scripts of the world."""

import re
import sys
import unicodedata

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from ppo_jax.errors import InputError
from ppo_jax.evaluation import bleu, rouge
from ppo_jax.evaluation.text import split_words

# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop; foo_bar 3.14!", ["don", "t", "stop", "foo", "bar", "3", "14"]),
        ("Größe, Straße. ÉTÉ", ["grösse", "strasse", "été"]),
        ("ΟΔΟΣ οδός", ["οδοσ", "οδόσ"]),  # the sigma at the end of a word is a sigma
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs and virama are marks of the word
        ("بِسْمِ اللهِ", ["بِسْمِ", "اللهِ"]),
        ("می\u200cخواهم", ["میخواهم"]),  # a non-joiner stands within a word
        ("한국어 문장", ["한국어", "문장"]),
        ("你好，世界。", ["你", "好", "世", "界"]),
        ("𠮷野家で食べた", list("𠮷野家で食べた")),
        ("用GPT2写2024年", ["用", "gpt2", "写", "2024", "年"]),
        ("กำลังที่นี่", ["ก", "ำ", "ลั", "ง", "ที่", "นี่"]),  # a letter and the marks on it
        ("ខ្មែរ\u200bមែ", ["ខ្", "មែ", "រ", "មែ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("בית\u05beספר", ["בית", "ספר"]),  # a maqaf is a hyphen
        ("co\u00adoperate", ["cooperate"]),  # a soft hyphen
        ("☂️ \u0301 \ud800 …", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == [unicodedata.normalize("NFC", word) for word in words]


def test_composed_and_decomposed_letters_are_the_same():
    text = "Ångström déjà vu, ガギグ 한국"
    assert split_words(unicodedata.normalize("NFD", text)) == split_words(unicodedata.normalize("NFC", text))


def test_no_letter_of_any_script_is_lost():
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd"):
            assert "".join(split_words(char)) == unicodedata.normalize("NFC", char.casefold()), hex(code)


# ROUGE


def random_text(rng, alphabet: str, size: int) -> str:
    return "".join(rng.choice(list(alphabet), size))


def test_on_ascii_it_is_rouge_score(rng):
    alphabet = "ab AB01 .,'-_\n\t!?"
    texts = [random_text(rng, alphabet, int(rng.integers(0, 60))) for _ in range(120)]
    responses, references = texts[:60], texts[60:]
    plain = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    expected = [plain.score(reference, response) for reference, response in zip(references, responses, strict=True)]
    made = rouge(responses, [[reference] for reference in references])
    for name in made:
        assert made[name] == pytest.approx(sum(row[name].fmeasure for row in expected) / 60)
        assert made[name] > 0


def test_rouge_golden():
    # Response "the cat sat" against "the cat ran home":
    # 1-grams: 2 common of 3 and 4: P 2/3, R 1/2, F = 2 * 1/3 / (7/6) = 4/7; 2-grams: 1 of 2 and 3: P 1/2, R 1/3, F 2/5;
    # longest common subsequence 2: as the 1-grams.
    made = rouge(["the cat sat"], [["the cat ran home"]])
    assert made == {
        "rouge1": pytest.approx(4 / 7), "rouge2": pytest.approx(2 / 5), "rougeL": pytest.approx(4 / 7)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("response", "reference", "rouge1", "rouge2"),
    [
        # 3 characters of 4 are common, 2 pairs of 3
        ("今天很好", "今天很冷", 3 / 4, 2 / 3),
        # The same as words: 2 of 3 and 1 of 2
        ("очень хороший день", "очень хороший фильм", 2 / 3, 1 / 2),
        ("बहुत अच्छा दिन", "बहुत अच्छा घर", 2 / 3, 1 / 2),
        ("يوم جميل جدا", "يوم جميل هنا", 2 / 3, 1 / 2),
    ],
)
def test_rouge_counts_in_every_script(response, reference, rouge1, rouge2):
    made = rouge([response], [[reference]])
    assert made["rouge1"] == pytest.approx(rouge1)
    assert made["rouge2"] == pytest.approx(rouge2)
    assert made["rougeL"] == pytest.approx(rouge1)


def test_the_best_reference_counts_and_rows_are_averaged():
    # First row: equal to its second reference, 1; second row: nothing in common, 0.
    assert rouge(["a b c", "x"], [["q", "a b c", "a"], ["y"]]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_an_empty_response_has_nothing_in_common():
    assert rouge(["", "..."], [["a"], ["a"]]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


# BLEU


def test_bleu_golden():
    # "the cat sat on the mat" against "the cat sat on a mat": 1-grams 5/6 (the second "the" is too much), 2-grams 3/5,
    # 3-grams 2/4, 4-grams 1/3; equal lengths. (5/6 * 3/5 * 1/2 * 1/3) ^ 1/4 = (1/12) ^ 1/4 = 0.5373
    made = bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert made.score == pytest.approx(100 * (1 / 12) ** 0.25)
    assert made.signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


def test_bleu_is_of_the_corpus(rng):
    words = [random_text(rng, "abc ", 40) for _ in range(40)]
    made = bleu(words[:20], [[text] for text in words[20:]])
    assert made.score == pytest.approx(sacrebleu.corpus_bleu(words[:20], [words[20:]]).score)


def test_rows_may_have_different_numbers_of_references():
    responses = ["the old cat sat here today", "a very good film indeed"]
    made = bleu(responses, [["nothing of this kind at all", responses[0]], [responses[1]]])
    assert made.score == pytest.approx(100)
    assert "nrefs:var" in made.signature


@pytest.mark.parametrize(
    ("language", "reference", "tokenizer"),
    [
        ("", "今天天气很好，我们去公园。", "zh"),
        ("", "今日は天気がとてもいいですね", "char"),
        ("", "วันนี้อากาศดีมาก", "char"),
        ("", "Der Film war 很好", "13a"),
        ("", "오늘은 날씨가 좋다", "13a"),
        ("", "...", "13a"),
        ("zh", "今天", "zh"),
        ("zh-TW", "今天", "zh"),
        ("zh_Hant", "今天", "zh"),
        ("TH", "วันนี้", "char"),
        ("de", "今天", "13a"),
        ("yue", "今天", "13a"),
    ],
)
def test_the_language_chooses_the_tokenizer(language, reference, tokenizer):
    assert f"|tok:{tokenizer}|" in bleu(["x"], [[reference]], language).signature


def test_chinese_characters_count():
    # Equal but for the last of 8 characters; with 13a this is one word, and another one.
    response, reference = "今天天气真的很好", "今天天气真的很冷"
    assert bleu([response], [[reference]]).score > 80
    assert bleu([response], [[reference]], "en").score == 0


def test_a_hundred_tokenized_lines_draw_no_advice(capfd, caplog):
    bleu(["it is so ."] * 150, [["it is so ."]] * 150)
    assert not caplog.records
    assert capfd.readouterr().err == ""


# Refusals


@pytest.mark.parametrize("measure", [bleu, rouge])
@pytest.mark.parametrize(
    ("responses", "references", "told"),
    [
        ([], [], "responses: got 0, expected at least 1"),
        (["a"], [["a"], ["b"]], "references: got 2, expected 1"),
        (["a", "b"], [["a"], []], r"references of response 2: got \[\], expected a list of texts"),
        (["a"], ["a"], "references of response 1: got 'a', expected a list of texts"),
    ],
)
def test_rows_that_cannot_be_are_refused(measure, responses, references, told):
    with pytest.raises(InputError, match=f"^{told}"):
        measure(responses, references)


@pytest.mark.parametrize("language", ["german", "d", "12", "-", "zh\n"])
def test_a_language_is_a_code(language):
    with pytest.raises(InputError, match=f"^language: got {re.escape(repr(language))}, expected a code"):
        bleu(["a"], [["a"]], language)


def test_a_tokenizer_that_is_missing_is_told(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("\nJapanese tokenization requires extra dependencies\n\n    pip install sacrebleu[ja]\n")

    monkeypatch.setattr(sacrebleu, "BLEU", broken)
    with pytest.raises(InputError, match=r"^language: got 'ja': .* pip install sacrebleu\[ja\]$"):
        bleu(["a"], [["a"]], "ja")


@pytest.mark.parametrize(("measure", "package"), [(bleu, "sacrebleu"), (rouge, "rouge_score")])
def test_a_package_that_is_missing_is_told_with_its_extra(measure, package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'^(BLEU|ROUGE) needs the "eval" extra: pip install -e "\.\[eval\]"$'):
        measure(["a"], [["a"]])
