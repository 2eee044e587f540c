"""The kinds of sentences that `mi.tasks.sentences` makes: functions from a `Grammar` to a clause."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mechinterp.tasks import lexicon
from mechinterp.tasks.grammar import NEVER, NOT, Grammar, Link, Word

Voice: TypeAlias = Literal["active", "passive"]
Make: TypeAlias = Callable[[Grammar], Word]
VOICES: tuple[Voice, Voice] = ("active", "passive")


@dataclass(frozen=True)
class Frame:
    """A kind of sentence.

    Attributes:
        make: its main clause, without punctuation.
        opinion: whether it praises or blames.
        bare: whether nothing may stand between its subject and its verb.
        front: whether a time or place may stand before it.
    """

    name: str
    make: Make
    voice: Voice
    opinion: bool
    bare: bool
    front: bool


FRAMES: list[Frame] = []


def frame(voice: Voice, *, opinion: bool = False, bare: bool = False, front: bool = True) -> Callable[[Make], Make]:
    """Adds a function to `FRAMES`, under its name."""

    def add(make: Make) -> Make:
        FRAMES.append(Frame(make.__name__.replace("_", " "), make, voice, opinion, bare, front))
        return make

    return add


# Active, without an opinion


@frame("active")
def intransitive(g: Grammar) -> Word:
    """The guards near the gate walk slowly."""
    subject = g.subject("PERSON")
    verb = g.pick(list(lexicon.INTRANSITIVE))
    how = [g.manner(lexicon.INTRANSITIVE[verb])] if g.chance(0.5) else []
    return g.clause(subject, g.finite(verb), *how, *g.perhaps(0.8))


@frame("active")
def transitive(g: Grammar) -> Word:
    """The lawyers review the plan."""
    subject = g.subject("PERSON")
    verb = g.pick(list(lexicon.TRANSITIVE))
    return g.clause(subject, g.finite(verb), ("obj", g.noun(lexicon.TRANSITIVE[verb])), *g.perhaps())


@frame("active")
def negated(g: Grammar) -> Word:
    """The pilot does not answer the calls."""
    subject = g.subject("PERSON")
    verb, after = g.acting()
    return g.clause(subject, Word(verb, "VERB").led_by(("aux", g.do()), NOT), *after, *g.perhaps())


@frame("active")
def progressive(g: Grammar) -> Word:
    """The child is watching the dance."""
    subject = g.subject("PERSON")
    verb, after = g.acting()
    return g.clause(subject, Word(lexicon.gerund(verb), "VERB").led_by(("aux", g.be())), *after)


@frame("active", front=False)
def copula_adjective(g: Grammar) -> Word:
    """The bridge behind the church is old."""
    kind = g.rng.choice(list(lexicon.NEUTRAL_PREDICATES))
    subject = g.subject(kind)
    return g.clause(subject, g.adjective(g.rng.choice(lexicon.NEUTRAL_PREDICATES[kind])))


@frame("active", front=False)
def comparison(g: Grammar) -> Word:
    """The tower is taller than the wall; it is as tall as the wall."""
    kind = g.rng.choice(list(lexicon.MEASURES))
    subject, other = g.subject(kind), g.noun(kind)
    form = g.rng.choice(lexicon.MEASURES[kind])
    if g.chance(0.5):
        return g.clause(subject, g.adjective(lexicon.comparative(form)), ("obl", g.phrase("than", other)))
    same = Word(form, "ADJ").led_by(("cop", g.be()), ("advmod", Word("as", "ADV")))
    return g.clause(subject, same, ("obl", g.phrase("as", other)))


@frame("active", front=False)
def copula_noun(g: Grammar) -> Word:
    """The man near the boats is a sailor."""
    subject = g.subject("man woman neighbor visitor guest host")
    return g.clause(subject, g.predicate(lexicon.ROLES).led_by(("cop", g.be())))


@frame("active", front=False)
def copula_place(g: Grammar) -> Word:
    """The boats are behind the fence."""
    subject = g.subject(lexicon.MOVABLE)
    return g.clause(subject, g.at("near behind beside in inside", "PLACE").led_by(("cop", g.be())))


@frame("active", bare=True, front=False)
def existential(g: Grammar) -> Word:
    """There is a guard near the gate."""
    there, noun = Word("there", "PRON"), g.new(f"PERSON {lexicon.MOVABLE}", g.number)
    return g.be("VERB").led_by(("expl", there)).then(("nsubj", noun), ("obl", g.at("near behind in", "PLACE")))


@frame("active", front=False)
def possession(g: Grammar) -> Word:
    """The farm near the stations has two gates."""
    subject = g.subject("PLACE")
    g.timed = True  # it does not have them often
    return g.clause(subject, g.finite("have"), ("obj", g.new("gate wall fence statue tower well fountain clock bell")))


@frame("active")
def phase(g: Grammar) -> Word:
    """The dance for the guests starts after the meal."""
    subject = g.subject("EVENT")
    return g.clause(subject, g.finite(g.pick(lexicon.PHASE)), ("obl", g.at("before after", "EVENT")))


@frame("active")
def motion(g: Grammar) -> Word:
    """The sailors march to the castle to hear a song."""
    subject = g.subject("PERSON")
    verb = g.finite(g.pick(lexicon.MOTION))
    if g.chance(0.5):
        return g.clause(subject, verb, ("obl", g.at("to", "PLACE")), g.errand())
    return g.clause(subject, verb, ("obl", g.at("from", "PLACE")), ("obl", g.at("to", "PLACE")))


@frame("active")
def two_verbs(g: Grammar) -> Word:
    """The sailors rest and talk near the harbor."""
    subject = g.subject("PERSON")
    first, other = (g.finite(g.pick(list(lexicon.INTRANSITIVE))) for _ in range(2))
    both: Link = ("conj", other.led_by(("cc", Word("and", "CCONJ"))))
    return g.clause(subject, first, both, *g.perhaps())


@frame("active")
def statement(g: Grammar) -> Word:
    """The judge thinks that the cooks planned a visit."""
    subject = g.subject("PERSON")
    verb = g.pick(lexicon.STATING)
    return g.clause(subject, g.finite(verb), ("ccomp", g.told().led_by(*g.that(verb))))


@frame("active")
def indirect_question(g: Grammar) -> Word:
    """The lawyer knows why the guests left the party."""
    subject = g.subject("PERSON")
    verb = g.pick(lexicon.WONDERING)
    opening: Link = ("mark", Word("whether", "SCONJ"))
    if g.chance(0.6):
        opening = ("advmod", Word(g.rng.choice(("why", "where", "when", "how")), "ADV"))
    return g.clause(subject, g.finite(verb), ("ccomp", g.told().led_by(opening)))


@frame("active")
def intention(g: Grammar) -> Word:
    """The nurses plan to visit the museum."""
    subject = g.subject("PERSON")
    return g.clause(subject, g.finite(g.pick(lexicon.INTENDING)), g.made_to(), *g.perhaps(0.3))


@frame("active")
def bare_infinitive(g: Grammar) -> Word:
    """The visitors watched the cooks paint the wall."""
    subject = g.subject("PERSON")
    verb, other = g.finite(g.pick(lexicon.LETTING)), g.noun("PERSON")
    act, after = g.acting()
    return g.clause(subject, verb, ("obj", other), ("xcomp", Word(act, "VERB").then(*after)))


@frame("active")
def purpose(g: Grammar) -> Word:
    """The farmer visits the market to find a basket."""
    subject = g.subject("PERSON")
    verb = g.pick("visit cross")
    place = g.noun("PLACE" if verb == "visit" else lexicon.TRANSITIVE[verb])
    return g.clause(subject, g.finite(verb), ("obj", place), g.errand())


@frame("active")
def double_object(g: Grammar) -> Word:
    """The host offers the guests a meal."""
    subject = g.subject("PERSON")
    verb, whom, given = g.pick(lexicon.GIVING), g.noun("PERSON"), g.noun(lexicon.GIVEN)
    return g.clause(subject, g.finite(verb), ("iobj", whom), ("obj", given), *g.perhaps(0.3))


@frame("active")
def dative(g: Grammar) -> Word:
    """The host showed the map to the guests."""
    subject = g.subject("PERSON")
    verb = g.pick(lexicon.GIVING)
    given, other = g.noun(lexicon.GIVEN), g.phrase("to", g.noun("PERSON"))
    return g.clause(subject, g.finite(verb), ("obj", given), ("obl", other))


@frame("active")
def temporal_clause(g: Grammar) -> Word:
    """The cooks rest after the guests visit the park."""
    subject = g.subject("PERSON")
    verb, after = g.acting()
    return g.clause(subject, g.finite(verb), *after, g.during())


# Passive, without an opinion


@frame("passive")
def agent(g: Grammar) -> Word:
    """The plans are reviewed by the lawyers."""
    subject, verb = g.undergoing()
    return g.clause(subject, g.passive(verb), g.by("PERSON"), *g.perhaps(0.3))


@frame("passive")
def agentless(g: Grammar) -> Word:
    """The gate was painted last week."""
    subject, verb = g.undergoing()
    return g.clause(subject, g.passive(verb), *g.perhaps(0.9))


@frame("passive")
def passive_negated(g: Grammar) -> Word:
    """The bridge was not repaired by the engineers."""
    subject, verb = g.undergoing()
    by = [g.by("PERSON")] if g.chance(0.5) else g.perhaps(0.6)
    return g.clause(subject, g.passive(verb, NOT), *by)


@frame("passive")
def passive_progressive(g: Grammar) -> Word:
    """The roof is being repaired by the engineer."""
    subject, verb = g.undergoing()
    by = [g.by("PERSON")] if g.chance(0.6) else []
    return g.clause(subject, g.passive(verb, ("aux", Word("being", "AUX"))), *by)


@frame("passive")
def passive_told(g: Grammar) -> Word:
    """The children were asked to wait."""
    subject = g.subject("PERSON")
    return g.clause(subject, g.passive(g.pick(lexicon.TELLING)), g.made_to())


@frame("passive")
def passive_double_object(g: Grammar) -> Word:
    """The guests were offered a meal by the host."""
    subject = g.subject("PERSON")
    verb, given = g.passive(g.pick(lexicon.GIVING)), g.noun(lexicon.GIVEN)
    return g.clause(subject, verb, ("obj", given), g.by("PERSON"))


@frame("passive")
def passive_dative(g: Grammar) -> Word:
    """The letters were sent to the lawyer."""
    subject = g.subject(lexicon.GIVEN)
    verb = g.passive(g.pick(lexicon.GIVING))
    return g.clause(subject, verb, ("obl", g.phrase("to", g.noun("PERSON"))), *g.perhaps(0.3))


@frame("passive")
def passive_temporal_clause(g: Grammar) -> Word:
    """The wall was painted before the guests visited the castle."""
    subject, verb = g.undergoing()
    return g.clause(subject, g.passive(verb), g.during())


# With an opinion


@frame("active", opinion=True, front=False)
def opinion_adjective(g: Grammar) -> Word:
    """The dance behind the church was delightful."""
    kind = g.rng.choice(list(lexicon.SHADES))
    subject = g.subject(kind)
    return g.clause(subject, g.adjective(g.shade(lexicon.SHADES[kind])))


@frame("active", opinion=True)
def opinion_feeling(g: Grammar) -> Word:
    """The cooks were happy to host the show."""
    subject = g.subject("PERSON")
    return g.clause(subject, g.adjective(g.shade(lexicon.FEELINGS)), g.made_to())


@frame("active", opinion=True, front=False)
def opinion_noun(g: Grammar) -> Word:
    """The concert near the gardens was a disaster."""
    subject = g.subject("EVENT")
    what = Word(g.shade(lexicon.JUDGMENTS), "NOUN", "sing").led_by(("cop", g.be()), ("det", Word("a", "DET")))
    return g.clause(subject, what)


@frame("active", opinion=True)
def opinion_stimulus(g: Grammar) -> Word:
    """The report about the bridges pleased the visitors."""
    subject = g.subject("EVENT TEXT SOUND")
    return g.clause(subject, g.finite(g.shaded(lexicon.PLEASING)), ("obj", g.noun("PERSON")), *g.perhaps())


@frame("active", opinion=True)
def opinion_negated(g: Grammar) -> Word:
    """The guides did not impress the visitors."""
    subject = g.subject("EVENT TEXT PERSON")
    verb, whom = g.shaded(lexicon.NOT_PLEASING), g.noun("PERSON")
    if g.chance(0.5):
        return g.clause(subject, Word(verb, "VERB").led_by(("aux", g.do()), NOT), ("obj", whom))
    g.timed = True
    return g.clause(subject, g.finite(verb).led_by(NEVER), ("obj", whom))


@frame("active", opinion=True)
def opinion_felt(g: Grammar) -> Word:
    """The hosts felt delight after the show."""
    subject = g.subject("PERSON")
    felt = Word(g.shaded(lexicon.FELT), "NOUN", "sing")
    return g.clause(subject, g.finite("feel"), ("obj", felt), g.when())


@frame("active", opinion=True, front=False)
def opinion_experiencer(g: Grammar) -> Word:
    """The neighbors admired the play."""
    subject = g.subject("PERSON")
    return g.clause(subject, g.finite(g.shaded(lexicon.LIKING)), ("obj", g.noun(lexicon.LIKED)))


@frame("active", opinion=True)
def opinion_manner(g: Grammar) -> Word:
    """The singer near the windows performed beautifully."""
    subject = g.subject("PERSON")
    verb = g.finite(g.pick(lexicon.PERFORMING))
    return g.clause(subject, verb, ("advmod", Word(g.shade(lexicon.SHADED_ADVERBS), "ADV")), *g.perhaps(0.6))


@frame("active", opinion=True)
def opinion_attribute(g: Grammar) -> Word:
    """The farmers attended a splendid concert."""
    subject = g.subject("PERSON")
    verb = g.pick("attend plan host")
    what = g.new(lexicon.TRANSITIVE[verb], adjective=g.shade(lexicon.SHADES["EVENT"]))
    return g.clause(subject, g.finite(verb), ("obj", what))


@frame("active", opinion=True)
def opinion_statement(g: Grammar) -> Word:
    """The guests think that the play is brilliant."""
    subject = g.subject("PERSON")
    verb = g.pick(lexicon.BELIEVING)
    kind, number = g.rng.choice(list(lexicon.SHADES)), g.any_number()
    inner = g.adjective(g.shade(lexicon.SHADES[kind]), number).led_by(("nsubj", g.noun(kind, number)))
    return g.clause(subject, g.finite(verb), ("ccomp", inner.led_by(*g.that(verb))))


@frame("passive", opinion=True)
def opinion_passive_stimulus(g: Grammar) -> Word:
    """The visitors were delighted by the dance."""
    subject = g.subject("PERSON")
    verb = g.passive(g.shaded(lexicon.PLEASING))
    return g.clause(subject, verb, g.by("EVENT TEXT SOUND"), *g.perhaps())


@frame("passive", opinion=True)
def opinion_passive_negated(g: Grammar) -> Word:
    """The visitors were not impressed by the report."""
    subject = g.subject("PERSON")
    never = g.chance(0.5)
    g.timed = g.timed or never
    verb = g.passive(g.shaded(lexicon.NOT_PLEASING), NEVER if never else NOT)
    return g.clause(subject, verb, g.by("EVENT TEXT SOUND"), *g.perhaps(0.3))


@frame("passive", opinion=True, front=False)
def opinion_passive_experiencer(g: Grammar) -> Word:
    """The play was admired by the guests."""
    subject = g.subject(lexicon.LIKED)
    return g.clause(subject, g.passive(g.shaded(lexicon.LIKING)), g.by("PERSON"), *g.perhaps(0.3))


@frame("passive", opinion=True)
def opinion_passive_greeted(g: Grammar) -> Word:
    """The song was greeted with praise by the guests."""
    subject = g.subject(lexicon.LIKED)
    reply = g.phrase("with", Word(g.shaded(lexicon.GREETED), "NOUN", "sing"))
    return g.clause(subject, g.passive("greet"), ("obl", reply), g.by("PERSON"))


@frame("passive", opinion=True)
def opinion_passive_manner(g: Grammar) -> Word:
    """The gate near the mills was painted badly."""
    verb = g.rng.choice(list(lexicon.MADE))
    subject = g.subject(lexicon.MADE[verb])
    how: Link = ("advmod", Word(g.shade(lexicon.SHADED_ADVERBS), "ADV"))
    by = [g.by("PERSON")] if g.chance(0.5) else []
    return g.clause(subject, g.passive(verb), how, *by)
