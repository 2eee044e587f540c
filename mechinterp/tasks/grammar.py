"""A small grammar of English: words with their dependents, and the phrases of `mi.tasks.sentences`.

Dependencies follow Universal Dependencies for English (de Marneffe et al. 2021), without subtypes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from mechinterp.tasks import lexicon

Number: TypeAlias = Literal["sing", "plur"]
Tense: TypeAlias = Literal["past", "present"]
Polarity: TypeAlias = Literal["positive", "negative"]
TENSES: tuple[Tense, Tense] = ("past", "present")
NUMBERS: tuple[Number, Number] = ("sing", "plur")
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")
DETERMINERS = ("the", "any", "this", "whose", "two")
VOWELS = "aeiou"


@dataclass(frozen=True)
class Word:
    """A word with its dependents before and after it, each with its relation to the word."""

    form: str
    pos: str
    number: Number | None = None
    tense: Tense | None = None
    before: tuple["Link", ...] = ()
    after: tuple["Link", ...] = ()

    def led_by(self, *links: "Link") -> "Word":
        """The same with more dependents, before all others."""
        return replace(self, before=(*links, *self.before))

    def then(self, *links: "Link") -> "Word":
        """The same with more dependents, after all others."""
        return replace(self, after=(*self.after, *links))


Link: TypeAlias = tuple[str, Word]
NOT: Link = ("advmod", Word("not", "PART"))
NEVER: Link = ("advmod", Word("never", "ADV"))
TO: Link = ("mark", Word("to", "PART"))


@dataclass
class Grammar:
    """Phrases of one sentence, in its tense, its subject's number, and its polarity.

    Attributes:
        between: the number of the last noun between the subject and its verb; None: no noun stands there.
        used: nouns and verbs that have been said, which are not said again.
        timed: whether it has been said when, or how often.
    """

    rng: random.Random
    tense: Tense
    number: Number
    between: Number | None
    polarity: Polarity | None
    used: set[str]
    timed: bool = False

    def pick(self, words: str | Sequence[str]) -> str:
        """One of the words, that has not been said if there is one; a group in capitals stands for its nouns."""
        names = words.split() if isinstance(words, str) else list(words)
        groups, often = [names], 8  # how often words of both kinds come
        if any(name in lexicon.NOUNS for name in names):
            self.rng.shuffle(names)
            groups, often = [list(lexicon.NOUNS.get(name, (name,))) for name in names], 4
        fresh = ([word for word in group if word not in self.used] for group in groups)
        group = next((group for group in fresh if group), groups[0])
        (chosen,) = self.rng.choices(group, [often if word in lexicon.BOTH else 1 for word in group])
        self.used.add(chosen)
        return chosen

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def any_number(self) -> Number:
        return self.rng.choice(NUMBERS)

    # Nouns

    def noun(self, words: str, number: Number | None = None) -> Word:
        """A noun with its determiner and perhaps an adjective: ``the old gate``."""
        return self._noun(self.pick(words), number or self.any_number())

    def new(self, words: str, number: Number | None = None, adjective: str | None = None) -> Word:
        """A noun that has not been spoken of: ``a gate``, ``two old gates``."""
        number = number or self.any_number()
        return self._noun(self.pick(words), number, self._determiner(number, ("any", "two")), adjective)

    def _noun(
        self, lemma: str, number: Number, determiners: Sequence[Link] | None = None, adjective: str | None = None
    ) -> Word:
        form = lexicon.plural(lemma) if number == "plur" else lemma
        if adjective is None and self.chance(0.25):
            adjective = self.rng.choice(lexicon.ADJECTIVES[lexicon.KINDS[lemma]])
        if determiners is None:
            determiners = self._determiner(number, self.rng.choices(DETERMINERS, (42, 38, 9, 8, 3)))
        return Word(form, "NOUN", number).led_by(*determiners, *([] if adjective is None else [amod(adjective)]))

    def _determiner(self, number: Number, kinds: Sequence[str]) -> list[Link]:
        kind = self.rng.choice(kinds)
        if kind == "this":
            form = self.rng.choice({"sing": ("this", "that"), "plur": ("these", "those")}[number])
            return [("det", Word(form, "DET", number))]
        if kind == "whose":
            form = self.rng.choice(("my", "our", "their"))
            return [("nmod", Word(form, "PRON", "sing" if form == "my" else "plur"))]
        if kind == "two" and number == "plur":
            return [("nummod", Word(self.rng.choice(("two", "three", "four")), "NUM"))]
        if kind in ("any", "two") and number == "plur" and self.chance(0.8):
            return []  # guards
        if kind in ("any", "two"):
            return [("det", Word("a" if number == "sing" else "some", "DET"))]
        return [("det", Word("the", "DET"))]

    def phrase(self, preposition: str, noun: Word) -> Word:
        """A noun with a preposition: ``near the gate``."""
        return noun.led_by(("case", Word(preposition, "ADP")))

    def by(self, words: str) -> Link:
        """Who did it: ``by the guards``."""
        return "obl", self.phrase("by", self.noun(words))

    def at(self, prepositions: str, words: str, number: Number | None = None) -> Word:
        """A phrase of one of the prepositions and words; a place's own one, such as ``on``, stands for ``in``."""
        preposition = self.rng.choice(prepositions.split())
        lemma = self.pick(lexicon.ENCLOSED if preposition in ("inside", "outside") else words)
        if preposition == "in":
            preposition = lexicon.PLACES.get(lemma, "in")
        return self.phrase(preposition, self._noun(lemma, number or self.any_number()))

    def subject(self, words: str) -> Word:
        """The subject in its number, with what stands between it and its verb."""
        if self.between is None and words == "PERSON" and self.chance(0.3):
            if self.number == "sing" and self.chance(0.5):
                return Word(self.pick(lexicon.NAMES), "PROPN", "sing")
            return Word(self.rng.choice(("he", "she")) if self.number == "sing" else "they", "PRON", self.number)
        lemma = self.pick(words)
        noun = self._noun(lemma, self.number)
        return noun if self.between is None else noun.then(*self._modifiers(lemma, self.between))

    def _modifiers(self, lemma: str, number: Number) -> list[Link]:
        """A phrase, two phrases or a clause, whose last noun has the number."""
        kind = lexicon.KINDS[lemma]
        if lemma in lexicon.TO_DO.split() and self.chance(0.6):  # the plan to visit the mill
            verb, thing = self._doing(number)
            return [("acl", Word(verb, "VERB").led_by(TO).then(("obj", thing)))]
        if lemma in lexicon.THAT_IT_IS.split() and self.chance(0.6):  # the claim that the guards visited the mill
            other = self.any_number()
            doer, (verb, thing) = self.noun("PERSON", other), self._doing(number)
            links = (("mark", Word("that", "SCONJ")), ("nsubj", doer))
            return [("acl", self.finite(verb, other).led_by(*links).then(("obj", thing)))]
        if kind == "PERSON" and self.chance(0.3):  # the guard who watches the gate
            who, (verb, thing) = Word(self.rng.choice(("who", "that")), "PRON"), self._doing(number)
            return [("acl", self.finite(verb, self.number).led_by(("nsubj", who)).then(("obj", thing)))]
        verbs = [verb for verb, objects in lexicon.TRANSITIVE.items() if {lemma, kind} & set(objects.split())]
        if verbs and self.chance(0.4):  # the gate that the guard watches
            verb, doer = self.pick(verbs), self.noun("PERSON", number)
            pronouns = ("that", "who" if kind == "PERSON" else "which")
            pronoun = [("obj", Word(self.rng.choice(pronouns), "PRON"))] if self.chance(0.6) else []
            return [("acl", self.finite(verb, number).led_by(*pronoun, ("nsubj", doer)))]
        if kind == "PERSON" and self.chance(0.4):  # the guard from the village with the boxes
            return [("nmod", self.at(*lexicon.FROM)), ("nmod", self.at(*lexicon.WITH, number))]
        options = list(lexicon.MODIFIERS[kind])
        if lemma in lexicon.ABOUT.split():
            options += [("about", lexicon.ABOUT_WHAT)] * 2
        return [("nmod", self.at(*self.rng.choice(options), number))]

    def _doing(self, number: Number) -> tuple[str, Word]:
        """A verb and its object."""
        verb = self.pick(list(lexicon.TRANSITIVE))
        return verb, self.noun(lexicon.TRANSITIVE[verb], number)

    # Verbs

    def finite(self, verb: str, number: Number | None = None) -> Word:
        """A verb in the sentence's tense, and in the number of the subject where the present shows it."""
        number = number or self.number
        if self.tense == "past":
            return Word(lexicon.past(verb), "VERB", None, "past")
        return Word(lexicon.third(verb) if number == "sing" else verb, "VERB", number, "present")

    def be(self, pos: str = "AUX", number: Number | None = None) -> Word:
        """A form of *be*, in the number of the subject by default."""
        number = number or self.number
        form = {"past": ("was", "were"), "present": ("is", "are")}[self.tense][number == "plur"]
        return Word(form, pos, number, self.tense)

    def do(self) -> Word:
        """A form of *do* that agrees with the subject."""
        if self.tense == "past":
            return Word("did", "AUX", None, "past")
        return Word("does" if self.number == "sing" else "do", "AUX", self.number, "present")

    def clause(self, subject: Word, verb: Word, *after: Link) -> Word:
        """A subject and its verb, with its auxiliaries, perhaps said how often, and what comes after it."""
        if verb.tense is not None and not self.timed and self.chance(0.15):
            self.timed = True
            often = lexicon.OFTEN + (lexicon.SELDOM if self.polarity is None else ())  # these would weaken an opinion
            verb = verb.led_by(("advmod", Word(self.rng.choice(often), "ADV")))
        return verb.led_by(("nsubj", subject)).then(*after)

    def passive(self, verb: str, *inner: Link) -> Word:
        """A passive, with what stands between it and *be*: ``was not painted``."""
        return Word(lexicon.participle(verb), "VERB").led_by(("aux", self.be()), *inner)

    def adjective(self, form: str, number: Number | None = None) -> Word:
        """An adjective that is said of a subject, which is the sentence's by default: ``is old``."""
        return Word(form, "ADJ").led_by(("cop", self.be(number=number)))

    def predicate(self, words: str) -> Word:
        """A noun that is said of the subject: ``a sailor``, ``sailors``."""
        lemma = self.pick(words)
        if self.number == "plur":
            return Word(lexicon.plural(lemma), "NOUN", "plur")
        return Word(lemma, "NOUN", "sing").led_by(("det", Word("a", "DET")))

    def undergoing(self) -> tuple[Word, str]:
        """A subject, and what is done to it."""
        verb = self.pick(list(lexicon.TRANSITIVE))
        return self.subject(lexicon.TRANSITIVE[verb]), verb

    def acting(self) -> tuple[str, list[Link]]:
        """What a person does: a verb, and its object or how it is done."""
        if self.chance(0.6):
            verb, thing = self._doing(self.any_number())
            return verb, [("obj", thing)]
        verb = self.pick(list(lexicon.INTRANSITIVE))
        return verb, [self.manner(lexicon.INTRANSITIVE[verb])] if self.chance(0.6) else []

    def made_to(self) -> Link:
        """What somebody wants, or is asked, to do: ``to paint the gate``."""
        verb, after = self.acting()
        return "xcomp", Word(verb, "VERB", None, None, (TO,), tuple(after))

    def errand(self) -> Link:
        """What somebody comes for: ``to hear a song``."""
        verb = self.pick(lexicon.ERRANDS)
        return "advcl", Word(verb, "VERB").led_by(TO).then(("obj", self.noun(lexicon.TRANSITIVE[verb])))

    def told(self) -> Word:
        """A short clause of its own subject, in the same tense."""
        number = self.any_number()
        subject = self.noun("PERSON", number)
        verb, after = self.acting()
        return self.finite(verb, number).led_by(("nsubj", subject)).then(*after)

    def that(self, verb: str) -> list[Link]:
        """*that* before a clause which the verb takes, or nothing where it may be left out."""
        if verb in lexicon.WITHOUT_THAT.split() and self.chance(0.4):
            return []
        return [("mark", Word("that", "SCONJ"))]

    def during(self) -> Link:
        """``before the guests visited the park``."""
        return "advcl", self.told().led_by(("mark", Word(self.rng.choice(("before", "after")), "SCONJ")))

    # What may be added

    def manner(self, adverbs: str) -> Link:
        return "advmod", Word(self.rng.choice(adverbs.split()), "ADV")

    def where(self) -> Link:
        if self.chance(0.4):
            return self.manner(lexicon.AROUND)
        return "obl", self.at("in near outside inside behind", "PLACE")

    def when(self) -> Link:
        if self.chance(0.5):
            return self.during()
        if self.timed or self.chance(0.4):
            return "obl", self.at("before after", "EVENT")
        return self.time()

    def time(self) -> Link:
        """``last week``, ``every morning``."""
        self.timed = True
        which, noun = self.rng.choice(lexicon.TIMES[self.tense])
        link = amod(which) if which == "last" else ("det", Word(which, "DET"))
        return "obl", Word(noun, "NOUN", "sing", None, (link,))

    def perhaps(self, share: float = 0.4) -> list[Link]:
        """Where or when it is done, or neither."""
        if not self.chance(share):
            return []
        return [self.where() if self.chance(0.5) else self.when()]

    def shade(self, pair: Sequence[str]) -> str:
        """One of the words of praise, or of blame."""
        assert self.polarity is not None  # frames of opinion have one
        return self.rng.choice(pair[POLARITIES.index(self.polarity)].split())

    def shaded(self, pair: Sequence[str]) -> str:
        """The same of verbs and nouns, which are not said twice."""
        assert self.polarity is not None
        return self.pick(pair[POLARITIES.index(self.polarity)])


def amod(adjective: str) -> Link:
    return "amod", Word(adjective, "ADJ")


@dataclass(frozen=True)
class Placed:
    """A word of a sentence, with the number of its head, -1 for the root."""

    form: str
    word: Word
    relation: str
    head: int
    start: int


def written(root: Word) -> tuple[str, list[Placed]]:
    """A clause as a sentence, with its first letter large and a full stop, and its words in order."""
    order: list[tuple[Word, str, list[int]]] = []
    _lay(root.then(("punct", Word(".", "PUNCT"))), "root", order)
    heads = {dependent: i for i, (_, _, below) in enumerate(order) for dependent in below}
    text, placed = "", list[Placed]()
    for i, (word, relation, _) in enumerate(order):
        form = "an" if word.form == "a" and order[i + 1][0].form[0] in VOWELS else word.form
        if not text:
            form = form[0].upper() + form[1:]
        elif word.pos != "PUNCT":
            text += " "
        placed.append(Placed(form, word, relation, heads.get(i, -1), len(text)))
        text += form
    return text, placed


def _lay(word: Word, relation: str, order: list[tuple[Word, str, list[int]]]) -> int:
    """Puts a word and all below it in order, each with its relation and its dependents' numbers; gives its number."""
    below = [_lay(other, name, order) for name, other in word.before]
    here = len(order)
    order.append((word, relation, below))
    below += [_lay(other, name, order) for name, other in word.after]
    return here
