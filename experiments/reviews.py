"""The quickstart's world: short reviews from a small grammar, a lexicon score and a recogniser.

Everything comes from the tables below: `generate_reviews` draws from them, `is_grammatical` recognises what they make,
and the lexicon is their words of praise and blame, so the three cannot drift apart. A review opens with a neutral
sentence, which serves as a prompt, and its sentiment comes after:

    Last week we tried the small diner by the river. The soup was tasty and the waiter was kind. I will gladly go back.

A rule is a name and its alternatives, separated by `|`; `{name}` is a slot that another rule fills. In a template, `+`
stands for the review's own polarity and `-` for the opposite one, so each line makes a praising and a blaming rule. No
template negates a slot ("not {any+}"): a word's polarity is its sentence's.
"""

import functools
import random
import re
from dataclasses import dataclass
from typing import Any

# Praise and blame: the lexicon; no other word of the grammar is in it. First the adjectives, by kind of aspect.
_POLAR = {
    "any": ("excellent | wonderful | superb | fantastic | great", "terrible | awful | dreadful | horrible | lousy"),
    "food": ("delicious | tasty | fresh | flavorful", "bland | tasteless | disgusting | mediocre"),
    "people": ("kind | friendly | polite | helpful | cheerful", "rude | unfriendly | careless | grumpy | arrogant"),
    "room": ("clean | cozy | charming | pleasant | spotless", "dirty | cramped | shabby | gloomy | smelly"),
    "seat": ("comfortable | sturdy | clean", "uncomfortable | broken | dirty"),
    "story": ("gripping | clever | moving | exciting | brilliant", "dull | boring | predictable | silly | tedious"),
    "art": ("beautiful | impressive | memorable | convincing", "clumsy | lifeless | forgettable | unconvincing"),
    "device": ("reliable | flawless | impressive | convenient", "unreliable | faulty | frustrating | useless"),
    "service": ("quick | efficient | smooth", "slow | chaotic | sloppy"),
    "price": ("fair | reasonable", "unfair | outrageous"),
    # Verbs, adverbs and nouns of the sentence templates.
    "liked": ("liked | loved | appreciated", "disliked | hated | despised"),
    "enjoyed": ("enjoyed | loved", "regretted | hated"),
    "pleased": ("pleased | delighted | impressed", "annoyed | disappointed | upset"),
    "happy": ("happy | thrilled | glad", "sorry | unhappy | sad"),
    "gladly": ("gladly | happily", "never | hardly"),
    "best": ("best | nicest", "worst | saddest"),
    "joy": ("joy | pleasure | treat | delight", "disaster | nightmare | letdown | mess"),
    "recommend": ("recommend", "warn"),
    "worth": ("worth", "waste"),
}

# The sentence templates; an alternative that stands twice is twice as frequent. A rule that is given for `+` only is
# mirrored for `-`.
_SENTENCES = """
body+: {claim+}. | {claim+}. | {claim+} and {claim+}. | {claim+} and {claim+}. | {claim+}, and even {claim+}. |
    {claim+}, and {narrator} also {liked+} {aspect}. | {narrator} {liked+} {aspect} and {aspect}. |
    {narrator} {liked+} the {thing} because {claim+}. | {narrator} {find} {view+}. | {narrator} {think} that {claim+}. |
    everyone {agrees} that {claim+}. | to my surprise, {claim+}. | as my {family} {says}, {claim+}. |
    {excess+} that {result+}. | what {a_any+} {thing}! | it {is} {a_any+} {thing} because {claim+}. |
    the {best+} thing {is} that {claim+}.
mixed+: {claim+}, but {claim-}. | although {claim+}, {claim-}. | while {claim+}, {claim-}. |
    {narrator} {liked+} {aspect}, but {claim-}. | {narrator} {liked+} the {thing} even though {claim-}. |
    on the one hand {claim+}, on the other hand {claim-}.
however+: however, {claim+}. | still, {claim+}. | then again, {claim+}.
closing+: I would {gladly+} {again}. | {narrator} would be {happy+} to {again}. | {narrator} {advice+}. |
    my {family} {enjoyed+} it as much as I did. | it {is} the {best+} {thing} of the year. | it {is} {value+}. |
    {narrator_was} {pleased+} with everything. | in the end {narrator_was} {happy+} about it. |
    all in all, it {is} {a_any+} {thing}. | it {is} a {real} {joy+}. | {narrator} gave it {stars+}.
undecided: I have not made up my mind. | it depends on what you look for. | you have to see for yourself. |
    {narrator} may {again} some day. | my {family} would give it three stars.
review+: {body+} {closing+} | {body+} {closing+} | {body+} {body+} | {fact} {body+} | {body+} {fact} {closing+}
balanced+: {mixed+} | {mixed+} {undecided} | {fact} {mixed+} | {mixed+} {closing-} | {body+} {however-}
value+: {worth+} every penny | {worth+} the money | {worth+} the time; value-: a {worth-} of money | a {worth-} of time
advice+: would {recommend+} it to {audience}; advice-: would {recommend-} {audience} about it
stars+: five stars; stars-: one star
result+: I told everyone about it | I forgot the time; result-: I could not believe it | I lost my patience
sentence: {opening} | {fact} | {undecided} | {body+} | {body-} | {mixed+} | {mixed-} | {however+} | {however-} |
    {closing+} | {closing-}
completion: {review+} | {review+} | {review+} | {review-} | {review-} | {review-} | {balanced+} | {balanced-}
"""

# Neutral words that all topics share.
_SHARED = """
time: last week | last month | last spring | last summer | in May | in June | in October | two weeks ago | a month ago
day: on Friday | on Sunday | yesterday | last night | last week | last Monday | in May | in October | two days ago
who: I | we | my sister and I | my wife and I | my brother and I | my parents and I | two friends and I
giver: my sister | my brother | my aunt | my parents | our neighbors | my friend Anna | my friend Tom
family: sister | brother | uncle | aunt | father | mother; audience: everyone | anyone | friends and family
narrator: I | we; narrator_was: I was | we were; really: really | truly; real: real | true
number: two | three | five | ten | twelve; color: blue | red | green | white | black; hour: six | seven | eight | nine
theme: a young pilot | two brothers | a lost ship | an old detective | a village doctor | a family of bakers | Mars
"""
_TENSES = {
    "past": "is: was; are: were; find: found; think: thought; agrees: agreed; says: had said",
    "present": "is: is; are: are; find: find; think: think; agrees: agrees; says: says",
}

# The topics. `thing`: what the review is about; `again`: the end of some closing sentences; `opening`: the prompts;
# `fact`: neutral sentences. A rule with `/` holds aspects, singular / plural, that its kind of adjectives goes with.
_TOPICS = """
tense: past; thing: meal | lunch | dinner; again: eat there again | go back there
place: the new cafe | the small diner | the old bakery | the Thai restaurant | the noodle bar | the pizza place
where: on Mill Street | near the station | by the river | behind the market | next to the library
opening: {time} {who} tried {place} {where}. | {who} had lunch at {place} {where} {day}. |
    {day} {who} went to {place} {where}. | {giver} took me to {place} {where} {day}. | {place} {where} opened {time}.
fact: {narrator} sat by the window. | {narrator} sat near the door. | {narrator} ordered {number} dishes.
food: soup | bread | coffee | salad | dessert / noodles | cakes | sandwiches; service: service / waiters
people: waiter | cook | owner / waiters | other guests; room: dining room | terrace / tables; price: bill / prices

tense: past; thing: stay | hotel | holiday; again: stay there again | book it again
place: the Park Hotel | the Grand Hotel | the Harbor Inn | a guest house | a family hotel
where: near the airport | by the lake | in the city center | by the sea | in the mountains
opening: {time} {who} stayed at {place} {where}. | {who} spent {number} nights at {place} {where} {time}. |
    {who} booked a room at {place} {where} {time}. | {giver} sent us to {place} {where} {time}.
fact: the room was on the {floor} floor. | breakfast started at {hour}. | {narrator} had room number {number}.
floor: second | third | top; food: breakfast | coffee / meals | drinks; people: manager | receptionist / cleaners
room: lobby | room / rooms | hallways; seat: bed / beds | chairs; service: front desk / porters; price: rate / fees

tense: past; thing: film | evening; again: watch it again | see it again
kind: a new film | an old film | a French film | a short film | a long film; place: Norway | Spain | Japan | Kenya
opening: {day} {who} watched {kind} about {theme}. | {who} saw {kind} about {theme} {day}. |
    {giver} invited me to {kind} about {theme} {day}. | {kind} about {theme} was shown at our school {day}.
fact: it lasted about two hours. | {narrator} sat in row {number}. | it was filmed in {place}.
story: plot | story | ending / dialogues | first scenes | jokes; art: acting | music / actors | costumes | songs

tense: present; thing: book | story; again: read it again; kind: a short novel | a thick book | a comic book
opening: {time} {who} read {kind} about {theme}. | {giver} gave me {kind} about {theme} {time}. |
    {who} borrowed {kind} about {theme} from the library {time}. | {who} found {kind} about {theme} in the attic {time}.
fact: it has {number} chapters. | {narrator} read it on the train. | the cover is {color}.
story: plot | story | ending / chapters | dialogues | adventures; art: language | hero / characters | drawings

tense: present; thing: device | product; again: buy it again | buy one again
kind: phone | tablet | laptop | camera; price: price / delivery costs; service: setup | repair service / updates
opening: {giver} bought this {kind} {time}. | {who} ordered this {kind} online {time}. |
    {giver} gave me this {kind} {time}. | {who} bought this {kind} {time}. | {time} {who} got this {kind} in the mail.
fact: it came in a {color} box. | it arrived after {number} days. | it fits into a small bag.
device: screen | battery | charger | software / buttons | speakers | menus; art: design / colors

tense: past; thing: evening | show | concert; again: go there again | hear them again
kind: a jazz concert | a folk concert | a piano concert | a choir concert | a rock concert
where: in the park | at the town hall | at the old theater | by the lake | in the church
opening: {day} {who} went to {kind} {where}. | {who} heard {kind} {where} {day}. |
    {giver} invited me to {kind} {where} {day}. | {who} had tickets for {kind} {where} {day}.
fact: it started at {hour}. | {narrator} sat in row {number}. | they played {number} songs.
art: music | singing | last song / singers | musicians | melodies
people: host | crowd / ushers; seat: bench / seats | chairs; price: ticket price / drink prices

tense: past; thing: trip | journey; again: travel that way again | take it again
kind: the night train | the early train | the long ferry | the evening bus
where: to the coast | to the capital | to Lisbon | to Oslo | to the islands
opening: {time} {who} took {kind} {where}. | {who} traveled on {kind} {where} {time}. |
    {giver} booked us seats on {kind} {where} {time}. | {time} {kind} {where} brought us to a wedding.
fact: it left at {hour}. | {narrator} changed in {number} towns. | {narrator} sat by the window.
people: staff | crew / other travelers | guards; seat: folding table / seats | beds | armrests
food: coffee | lunch / snacks | drinks; service: boarding | ticket office / connections; price: fare / ticket prices
"""

_WORD = re.compile(r"\w+|[^\w\s]")
_PART = re.compile(r"\{.+?\}|\w+|[^\w\s]")
_SENTENCE = re.compile(r"\s*[^.!?\s][^.!?]*[.!?]*|[.!?]+")
_OUT = -1  # where a recogniser stands that ran out of words
# From a slot, with its braces, to its alternatives, each a tuple of words, punctuation marks and slots.
Grammar = dict[str, list[tuple[str, ...]]]


def _alternatives(text: str) -> list[str]:
    return [" ".join(alternative.split()) for alternative in text.split("|")]


def _table(text: str) -> dict[str, list[str]]:
    """Reads rules written `name: alternative | alternative`; `;` and a new line that is not indented end a rule."""
    rules = (rule.split(": ", 1) for rule in re.split(r"; |\n(?=\S)", text.strip()))
    return {name: _alternatives(alternatives) for name, alternatives in rules}


def _grammar(topic: str) -> Grammar:
    """All rules of one topic; `sentence` is any sentence that a review about it can hold."""
    rules = _table(topic)
    aspects = {kind: "|".join(texts).split("/") for kind, texts in rules.items() if "/" in "".join(texts)}
    rules |= _table(_SHARED) | _table(_TENSES[rules["tense"][0]]) | _table(_SENTENCES)
    for sign, column in (("+", 0), ("-", 1)):
        rules |= {name + sign: _alternatives(pair[column]) for name, pair in _POLAR.items()}
        rules["a_any" + sign] = [f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in rules["any" + sign]]
    rules |= {"claim+": [], "view+": [], "excess+": [], "aspect": [], "nouns": []}
    for kind, nouns in aspects.items():
        general = ["{any+}"] * (kind not in ("price", "service"))
        rules[f"{kind}_how+"] = [f"{{{kind}+}}"] * 3 + [f"{{really}} {{{kind}+}}", *general]
        for verb, column in (("is", 0), ("are", 1)):
            subject, how = f"{{{kind}_{verb}}}", f"{{{kind}_how+}}"
            rules[f"{kind}_{verb}"] = [f"the {noun}" for noun in _alternatives(nouns[column])]
            rules["nouns"] += nouns[column].replace("|", " ").split()
            rules["claim+"].append(f"{subject} {{{verb}}} {how}")
            rules["view+"].append(f"{subject} {how}")
            if kind != "price":  # nobody likes a bill, however fair
                rules["excess+"].append(f"{subject} {{{verb}}} so {{{kind}+}}")
                rules["aspect"].append(subject)
    swap = str.maketrans("+-", "-+")
    mirrored = {name.translate(swap): [text.translate(swap) for text in texts] for name, texts in rules.items()}
    rules = mirrored | rules
    return {f"{{{name}}}": [tuple(_PART.findall(text)) for text in texts] for name, texts in rules.items()}


_GRAMMARS = [_grammar(topic) for topic in _TOPICS.split("\n\n")]
_VOCABULARIES = [{part for texts in rules.values() for parts in texts for part in parts} for rules in _GRAMMARS]

POSITIVE_WORDS = frozenset(word for praise, _ in _POLAR.values() for word in _alternatives(praise))
NEGATIVE_WORDS = frozenset(word for _, blame in _POLAR.values() for word in _alternatives(blame))
# What one text should name only once: its words of praise and blame, and the nouns that they are said about.
_CONTENT = POSITIVE_WORDS | NEGATIVE_WORDS | {word for rules in _GRAMMARS for (word,) in rules["{nouns}"]}


@dataclass(frozen=True)
class Review:
    """A neutral opening, what is said after it, and the lexicon score of the latter."""

    prompt: str
    completion: str
    sentiment: float

    @property
    def text(self) -> str:
        """The whole review."""
        return f"{self.prompt} {self.completion}"


def lexicon_score(text: str) -> float:
    """Sentiment by counting words: (positive - negative) / max(1, positive + negative), in [-1, 1].

    Three reviews in eight score +1, three -1, the others between, so a model of them starts near 0 and can reach 1. One
    word of praise without blame scores 1 already and a second one earns nothing more, so repeating words never pays, as
    it would if the score grew with their number. The cheapest way to 1, in KL to a model of the reviews, is to write
    its praising ones only: log(8 / 3) = 1 nat. A lone adjective, which that model hardly ever writes, costs more.
    """
    words = _WORD.findall(text.lower())
    positive = sum(word in POSITIVE_WORDS for word in words)
    negative = sum(word in NEGATIVE_WORDS for word in words)
    return (positive - negative) / max(1, positive + negative)


def _joined(words: list[str]) -> str:
    return re.sub(r" (?=\W)", "", " ".join(words))


def _pick(items: list, rng: random.Random) -> Any:
    # random() is the one method whose stream Python promises to keep from version to version.
    return items[int(rng.random() * len(items))]


def _fill(rules: Grammar, part: str, rng: random.Random) -> list[str]:
    """The words of a slot filled at random, or the word itself."""
    if part not in rules:
        return [part]
    return [word for inner in _pick(rules[part], rng) for word in _fill(rules, inner, rng)]


def _draw(rules: Grammar, slot: str, rng: random.Random) -> str:
    """A text for the slot, each sentence with its capital letter."""
    text = _joined(_fill(rules, slot, rng))
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda first: first[0].upper(), text)


def _repeats(text: str) -> bool:
    """Whether the text judges or names the same thing twice."""
    words = [word for word in _WORD.findall(text.lower()) if word in _CONTENT]
    return len(words) > len(set(words))


def draw_review(rng: random.Random) -> Review:
    """One review: three in eight praise, three in eight blame, a quarter does both."""
    rules = _pick(_GRAMMARS, rng)
    prompt = _draw(rules, "{opening}", rng)
    plural = re.search(r"\b(we|and I|us)\b", prompt, re.IGNORECASE)
    while True:
        completion = _draw(rules, "{completion}", rng)
        if not _repeats(completion) and (plural or not re.search(r"\b[Ww]e\b", completion)):
            return Review(prompt, completion, lexicon_score(completion))


def generate_reviews(num: int, seed: int) -> list[Review]:
    """Draws `num` reviews by `draw_review`.

    Args:
        num: how many; the first ones are the same for every `num`.
        seed: any integer; the same reviews on every machine and Python version.

    Returns:
        Independent reviews, nearly all distinct.
    """
    rng = random.Random(seed)
    return [draw_review(rng) for _ in range(num)]


def _parse(rules: Grammar, words: list[str]) -> frozenset[int]:
    """Where a sentence that starts with the first word can end, and `_OUT` if more words could complete one."""

    @functools.cache
    def ends(part: str, start: int) -> frozenset[int]:
        if start in (_OUT, len(words)):
            return frozenset([_OUT])
        if part in rules:
            return frozenset().union(*(sequence(parts, start) for parts in rules[part]))
        return frozenset([start + 1] if words[start] == part else [])

    def sequence(parts: tuple[str, ...], start: int) -> frozenset[int]:
        fronts = frozenset([start])
        for part in parts:
            fronts = frozenset().union(*(ends(part, front) for front in fronts))
            if not fronts:
                break
        return fronts

    return ends("{sentence}", 0)


@functools.lru_cache(maxsize=1 << 16)
def _judge(sentence: str) -> tuple[bool, bool]:
    """Whether the text is a sentence of the grammar, and whether it is the beginning of one."""
    words = _WORD.findall(sentence)
    if _joined(words) != sentence or not sentence[0].isupper() or _repeats(sentence):
        return False, False
    words[0] = words[0] if words[0] == "I" else words[0].lower()
    topics = (rules for rules, vocabulary in zip(_GRAMMARS, _VOCABULARIES, strict=True) if vocabulary.issuperset(words))
    ends = frozenset().union(*(_parse(rules, words) for rules in topics))
    return len(words) in ends, _OUT in ends


def is_grammatical(text: str) -> bool:
    """Whether the text is one or more sentences that the grammar can make, up to the last full stop."""
    return text.rstrip()[-1:] in (".", "!") and sentence_fraction(text) == 1


def sentence_fraction(text: str) -> float:
    """The share of a text's sentences that the grammar can make, in [0, 1]; 0 for a text without a complete sentence.

    A last sentence without its full stop, which is how a length limit cuts a text, is left out if it is the beginning
    of a sentence of the grammar, and counts as a failure if it is not.
    """
    judged = [(sentence[-1] in ".!?", *_judge(sentence)) for sentence in map(str.strip, _SENTENCE.findall(text))]
    counted = [accepted for complete, accepted, beginning in judged if complete or not beginning]
    return sum(counted) / max(1, len(counted))
