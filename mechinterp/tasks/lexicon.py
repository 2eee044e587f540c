"""The words of `mi.tasks.sentences`, by what may be said of them, and their forms.

A group in capitals stands for all its nouns. Many words are nouns and verbs alike (a plan, to plan), adjectives and
verbs (clean), adjectives and adverbs (early) or prepositions and adverbs (outside).
"""

NOUNS = {
    "PERSON": (
        "teacher", "farmer", "lawyer", "singer", "painter", "baker", "student", "doctor", "writer", "sailor",
        "gardener", "dancer", "soldier", "engineer", "visitor", "neighbor", "child", "man", "woman", "guest",
        "guard", "cook", "guide", "coach", "judge", "host", "nurse", "pilot", "witness", "escort", "tutor",
    ),
    "PLACE": (
        "garden", "station", "market", "harbor", "library", "school", "museum", "theater", "castle", "church", "farm",
        "hotel", "bank", "bridge", "village", "mill", "square", "park",
    ),
    "LANDMARK": ("gate", "fence", "wall", "statue", "tower", "well", "fountain", "sign", "building"),
    "THING": (
        "door", "window", "roof", "boat", "table", "chair", "lamp", "clock", "cart", "wagon", "bicycle", "engine",
        "machine", "ladder", "piano", "bell", "mirror", "barrel",
    ),
    "CARRIED": ("box", "bag", "bottle", "basket", "umbrella", "ticket", "watch"),
    "TEXT": (
        "letter", "story", "poem", "book", "article", "map", "list", "report", "plan", "answer", "question", "request",
        "claim", "offer", "review", "order", "promise", "note", "call", "study", "record", "copy", "sketch", "design",
        "painting",
    ),
    "EVENT": (
        "concert", "lesson", "meal", "festival", "party", "wedding", "trip", "parade", "visit", "walk", "dance",
        "march", "race", "play", "talk", "debate", "tour", "search", "vote", "show", "contest", "film", "test", "swim",
    ),
    "SOUND": ("shout", "laugh", "whisper", "smile", "song", "joke"),
}  # fmt: skip
KINDS = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
PLACES = {"station": "at", "market": "at", "school": "at", "mill": "at", "farm": "on", "bridge": "on"}
"""The preposition of a place where it is not ``in``."""
ENCLOSED = "garden market library school museum theater castle church hotel bank mill"
"""Places that have an inside."""

ADJECTIVES = {
    "PERSON": ("young", "old", "tall", "local", "quiet", "calm", "tired"),
    "PLACE": ("old", "new", "small", "large", "quiet", "calm", "empty", "open"),
    "LANDMARK": ("old", "new", "small", "large", "wooden", "white", "clean"),
    "THING": ("old", "new", "small", "large", "heavy", "red", "dry", "blue", "white", "clean"),
    "CARRIED": ("old", "new", "small", "large", "heavy", "red", "green", "dry", "empty", "open"),
    "TEXT": ("short", "long", "new", "old", "simple", "early", "late", "clear", "complete", "correct"),
    "EVENT": ("short", "long", "early", "late", "simple", "annual", "open", "quiet"),
    "SOUND": ("short", "long", "loud", "sudden", "quiet", "soft"),
}
NEUTRAL_PREDICATES = {
    "PERSON": ("young", "old", "tall", "tired", "thirsty", "busy", "early", "late"),
    "PLACE": ("old", "new", "small", "large", "quiet", "empty", "open", "calm"),
    "LANDMARK": ("old", "new", "small", "large", "wooden", "white", "clean"),
    "THING": ("old", "new", "small", "large", "heavy", "red", "green", "blue", "white", "clean"),
    "TEXT": ("short", "long", "new", "late", "complete"),
    "EVENT": ("short", "long", "early", "late"),
}
MEASURES = {
    "PERSON": ("young", "old", "tall", "short", "quiet", "calm"),
    "PLACE": ("old", "new", "small", "large", "quiet", "calm"),
    "LANDMARK": ("old", "new", "small", "large", "tall"),
    "THING": ("old", "new", "small", "large", "heavy", "clean"),
}
"""Adjectives by which things are compared."""

FROM = ("from", "PLACE")
WITH = ("with", "CARRIED")
BESIDE = "near behind beside opposite"
"""Prepositions of what may be anywhere."""
MODIFIERS: dict[str, tuple[tuple[str, str], ...]] = {
    "PERSON": ((f"{BESIDE} outside", "PLACE"), (BESIDE, "LANDMARK"), FROM, WITH),
    "PLACE": ((BESIDE, "PLACE LANDMARK"),),
    "LANDMARK": ((BESIDE, "PLACE LANDMARK"),),
    "THING": ((BESIDE, "PLACE LANDMARK"), FROM),
    "CARRIED": ((BESIDE, "LANDMARK"), FROM),
    "TEXT": (("from", "PERSON"), FROM),
    "SOUND": (("from", "PERSON"), ("in near inside", "PLACE")),
    "EVENT": (("near in outside", "PLACE"), ("after before", "EVENT")),
}
"""What may follow a noun: prepositions, and the nouns after them."""
ABOUT = "letter story poem book article report question claim review note talk debate play"
"""What can be about something."""
TO_DO = "plan offer promise request order vote call"
"""What can be to do something."""
THAT_IT_IS = "claim report promise story note"
"""What can be that something is so."""
ABOUT_WHAT = "PERSON PLACE THING EVENT"

TRANSITIVE = {
    "plan": "EVENT", "host": "dance debate concert festival party contest show race", "delay": "EVENT",
    "watch": "dance march race play debate concert show contest parade PERSON",
    "attend": "concert debate wedding lesson party festival play show", "film": "dance march race play parade PLACE",
    "record": "talk debate dance concert play show", "judge": "contest dance race play show debate",
    "review": "report plan book play film design show request offer", "study": "map report plan letter article book",
    "question": "plan claim report order PERSON", "copy": "letter report list note map poem article sketch design",
    "discuss": "plan report offer claim request vote visit trip", "answer": "question request letter call",
    "visit": "PLACE PERSON", "tour": "PLACE", "search": "PLACE cart wagon boat", "cross": "bridge park garden square",
    "guard": "gate door bridge castle bank tower", "paint": "gate door fence wall roof boat table chair wagon",
    "repair": "gate door fence wall roof boat clock cart machine ladder bridge building",
    "clean": "table window mirror boat engine statue fountain bottle", "open": "gate door window box bag",
    "empty": "box basket barrel bottle bag", "move": "table chair piano ladder statue barrel",
    "inspect": "THING PLACE", "sketch": "PLACE LANDMARK boat", "test": "engine machine ladder boat bell bridge",
    "design": "bridge tower boat machine statue garden", "mail": "letter map book article ticket",
    "sign": "letter report order list", "order": "meal book table chair lamp", "help": "PERSON", "call": "PERSON",
    "guide": "guest visitor child student", "coach": "dancer singer student child soldier", "follow": "PERSON",
    "describe": "PLACE THING EVENT", "find": "box map letter basket bag ticket", "build": "boat wall fence tower cart",
    "write": "letter story poem book report note", "hear": "SOUND", "nurse": "child soldier sailor visitor",
    "pilot": "boat", "cook": "meal", "witness": "march race dance debate vote test", "escort": "PERSON",
    "tutor": "student child singer dancer", "calm": "PERSON", "quiet": "child student guest visitor",
    "clear": "table square bridge station", "complete": "report list map painting design study",
    "correct": "report list map copy study", "dry": "boat chair bottle mirror bag",
}  # fmt: skip
"""Verbs of a person, and their objects."""
INTRANSITIVE = {
    "walk": "slowly fast", "talk": "quietly", "dance": "slowly", "march": "slowly fast", "laugh": "quietly loudly",
    "smile": "briefly", "shout": "loudly", "whisper": "quietly", "rest": "briefly", "work": "hard late quietly",
    "wait": "patiently quietly", "swim": "slowly fast", "sing": "quietly loudly", "sleep": "late",
    "travel": "slowly", "play": "quietly",
}  # fmt: skip
"""Verbs of a person, and how it is done."""
MOTION = "walk march travel race drive"
PHASE = "start end begin"
"""Verbs of an event."""
STATING = "say claim report note know hope doubt think believe"
BELIEVING = "think believe say claim"
WITHOUT_THAT = "say know hope think believe claim"
"""Verbs after which *that* may be left out."""
WONDERING = "wonder ask know"
LETTING = "help watch hear make see"
"""Verbs of a person who has to do with what another does."""
INTENDING = "want plan hope need promise refuse try offer"
TELLING = "ask tell invite allow expect order"
ROLES = (
    "teacher farmer lawyer singer painter baker driver student doctor writer sailor tailor gardener dancer soldier"
    " engineer guard cook guide coach judge nurse pilot"
)
"""What a person may be, other than a person."""
MOVABLE = "boat table chair cart wagon bicycle piano bell mirror barrel ladder CARRIED"
ERRANDS = "find sketch film clean paint repair help watch hear judge guard record test witness"
GIVING = "offer promise show send give"
GIVEN = "letter story poem book article map list report note answer meal box bag bottle basket umbrella ticket"
"""Verbs of a person, and what is given to another."""
SHADES = {
    "PERSON": (
        "kind friendly generous polite helpful honest gentle witty",
        "rude selfish cruel lazy greedy dishonest unfriendly arrogant",
    ),
    "PLACE": (
        "beautiful elegant charming splendid lovely superb wonderful magnificent",
        "ugly shabby hideous dreadful awful horrible dismal filthy",
    ),
    "TEXT": (
        "delightful brilliant excellent fascinating wonderful superb clever splendid",
        "dull tedious dreadful terrible boring clumsy awful dismal",
    ),
    "EVENT": (
        "delightful brilliant excellent fascinating wonderful superb lovely splendid",
        "dull tedious dreadful terrible boring chaotic awful dismal",
    ),
}
"""Adjectives that praise, and those that blame."""
PLEASING = ("please delight charm impress amuse cheer comfort", "annoy bore anger disappoint disgust dismay irritate")
"""Verbs of what pleases a person, or displeases."""
NOT_PLEASING = ("disappoint bore", "impress please amuse comfort")
"""The same, with a negation."""
LIKING = ("admire praise love adore value applaud cherish", "hate despise mock dislike detest curse resent")
"""Verbs of a person who likes something, or does not."""
LIKED = "play dance concert show film song poem story book plan report painting design walk"
SHADED_ADVERBS = (
    "beautifully brilliantly gracefully superbly splendidly wonderfully",
    "badly terribly clumsily dreadfully awfully horribly",
)
PERFORMING = "sing dance perform play"
MADE = {"paint": "gate door fence wall boat", "design": "bridge tower boat garden", "write": "letter story poem book"}
FEELINGS = ("happy glad proud eager", "sad sorry ashamed afraid")
FELT = ("delight comfort love joy pleasure", "anger disgust dismay hate boredom")
GREETED = ("praise delight cheer love joy", "anger disgust dismay hate scorn")
"""What comes back to what is greeted."""
JUDGMENTS = ("delight comfort success triumph joy pleasure", "bore failure disaster disappointment mess nuisance")

BOTH = set(KINDS) & {*TRANSITIVE, *INTRANSITIVE}
"""Words that are nouns and verbs; they are drawn more often than others."""

NAMES = ("Maria", "Omar", "Ivan", "Lucia", "Kenji", "Ruth", "Peter", "Amina")
TIMES = {
    "past": (("last", "week"), ("last", "month"), ("last", "year"), ("last", "night"), ("last", "spring")),
    "present": (("every", "morning"), ("every", "evening"), ("every", "week"), ("every", "year"), ("each", "day")),
}
OFTEN = ("often", "always", "usually")
SELDOM = ("rarely", "sometimes")
AROUND = "outside outside inside inside there here"

PLURALS = {"child": "children", "man": "men", "woman": "women"}
PASTS = {
    "write": ("wrote", "written"), "sing": ("sang", "sung"), "swim": ("swam", "swum"), "sleep": ("slept", "slept"),
    "know": ("knew", "known"), "find": ("found", "found"), "build": ("built", "built"), "say": ("said", "said"),
    "think": ("thought", "thought"), "tell": ("told", "told"), "show": ("showed", "shown"), "give": ("gave", "given"),
    "send": ("sent", "sent"), "begin": ("began", "begun"), "hear": ("heard", "heard"), "feel": ("felt", "felt"),
    "make": ("made", "made"), "see": ("saw", "seen"), "have": ("had", "had"), "drive": ("drove", "driven"),
}  # fmt: skip
"""Past tense and past participle of irregular verbs."""
DOUBLED = ("plan", "swim", "begin")
"""Verbs that double their last letter."""


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def plural(noun: str) -> str:
    return PLURALS.get(noun) or _with_s(noun)


def comparative(adjective: str) -> str:
    """Of an adjective without ``more``: older, larger, heavier."""
    return f"{adjective[:-1]}ier" if adjective.endswith("y") else f"{adjective.removesuffix('e')}er"


def third(verb: str) -> str:
    """He, she or it does it."""
    return "has" if verb == "have" else _with_s(verb)


def past(verb: str) -> str:
    return PASTS[verb][0] if verb in PASTS else _with_ed(verb)


def participle(verb: str) -> str:
    """It is done."""
    return PASTS[verb][1] if verb in PASTS else _with_ed(verb)


def gerund(verb: str) -> str:
    """Doing it."""
    if verb in DOUBLED:
        return f"{verb}{verb[-1]}ing"
    return f"{verb.removesuffix('e')}ing"


def _with_ed(verb: str) -> str:
    if verb in DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "ed"
