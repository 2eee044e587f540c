"""Translations, facts, questions and professions, of which `mi.tasks.concepts` and its like make texts.

All are of our own writing, and every sentence of the translations stands in all four languages.
"""

LANGUAGES = ("English", "French", "German", "Spanish")
TRANSLATIONS = {
    "home": (
        "The door is open. | La porte est ouverte. | Die Tür ist offen. | La puerta está abierta.",
        "We live in a small house. | Nous habitons dans une petite maison."
        " | Wir wohnen in einem kleinen Haus. | Vivimos en una casa pequeña.",
        "The key is on the table. | La clé est sur la table."
        " | Der Schlüssel liegt auf dem Tisch. | La llave está sobre la mesa.",
        "My room has two windows. | Ma chambre a deux fenêtres."
        " | Mein Zimmer hat zwei Fenster. | Mi cuarto tiene dos ventanas.",
    ),
    "food": (
        "The bread is still warm. | Le pain est encore chaud."
        " | Das Brot ist noch warm. | El pan todavía está caliente.",
        "I drink tea without sugar. | Je bois du thé sans sucre. | Ich trinke Tee ohne Zucker. | Bebo té sin azúcar.",
        "They eat soup every evening. | Ils mangent de la soupe tous les soirs."
        " | Sie essen jeden Abend Suppe. | Comen sopa todas las noches.",
        "The apples are cheap today. | Les pommes sont bon marché aujourd'hui."
        " | Die Äpfel sind heute billig. | Las manzanas están baratas hoy.",
    ),
    "weather": (
        "It is raining again. | Il pleut de nouveau. | Es regnet wieder. | Llueve otra vez.",
        "The wind comes from the north. | Le vent vient du nord."
        " | Der Wind kommt aus dem Norden. | El viento viene del norte.",
        "Tomorrow it will be colder. | Demain, il fera plus froid. | Morgen wird es kälter. | Mañana hará más frío.",
        "There is snow on the roof. | Il y a de la neige sur le toit."
        " | Auf dem Dach liegt Schnee. | Hay nieve en el tejado.",
    ),
    "travel": (
        "The train leaves at seven. | Le train part à sept heures."
        " | Der Zug fährt um sieben ab. | El tren sale a las siete.",
        "We are waiting for the bus. | Nous attendons le bus. | Wir warten auf den Bus. | Esperamos el autobús.",
        "The station is far away. | La gare est loin d'ici. | Der Bahnhof ist weit weg. | La estación está lejos.",
        "She bought two tickets. | Elle a acheté deux billets."
        " | Sie hat zwei Fahrkarten gekauft. | Ella compró dos billetes.",
    ),
    "school": (
        "The children are learning to read. | Les enfants apprennent à lire."
        " | Die Kinder lernen lesen. | Los niños aprenden a leer.",
        "The teacher writes on the board. | Le professeur écrit au tableau."
        " | Die Lehrerin schreibt an die Tafel. | La profesora escribe en la pizarra.",
        "I forgot my book. | J'ai oublié mon livre. | Ich habe mein Buch vergessen. | Olvidé mi libro.",
        "This question is easy. | Cette question est facile. | Diese Frage ist leicht. | Esta pregunta es fácil.",
    ),
    "work": (
        "He works in an office. | Il travaille dans un bureau."
        " | Er arbeitet in einem Büro. | Él trabaja en una oficina.",
        "The meeting begins at nine. | La réunion commence à neuf heures."
        " | Die Sitzung beginnt um neun. | La reunión empieza a las nueve.",
        "She answers every letter. | Elle répond à chaque lettre."
        " | Sie beantwortet jeden Brief. | Ella responde a cada carta.",
        "Nobody knows the new plan. | Personne ne connaît le nouveau plan."
        " | Niemand kennt den neuen Plan. | Nadie conoce el nuevo plan.",
    ),
    "animals": (
        "The dog sleeps under the bed. | Le chien dort sous le lit."
        " | Der Hund schläft unter dem Bett. | El perro duerme debajo de la cama.",
        "Two birds sing in the tree. | Deux oiseaux chantent dans l'arbre."
        " | Zwei Vögel singen im Baum. | Dos pájaros cantan en el árbol.",
        "The horse is older than the cow. | Le cheval est plus vieux que la vache."
        " | Das Pferd ist älter als die Kuh. | El caballo es más viejo que la vaca.",
        "Our cat does not like milk. | Notre chat n'aime pas le lait."
        " | Unsere Katze mag keine Milch. | A nuestro gato no le gusta la leche.",
    ),
    "family": (
        "My sister has three children. | Ma sœur a trois enfants."
        " | Meine Schwester hat drei Kinder. | Mi hermana tiene tres hijos.",
        "His parents live near the sea. | Ses parents vivent près de la mer."
        " | Seine Eltern leben am Meer. | Sus padres viven cerca del mar.",
        "The baby laughs a lot. | Le bébé rit beaucoup. | Das Baby lacht viel. | El bebé se ríe mucho.",
        "We will visit our uncle on Sunday. | Nous rendrons visite à notre oncle dimanche."
        " | Wir besuchen am Sonntag unseren Onkel. | Visitaremos a nuestro tío el domingo.",
    ),
    "time": (
        "Today is my birthday. | C'est mon anniversaire aujourd'hui."
        " | Heute ist mein Geburtstag. | Hoy es mi cumpleaños.",
        "The year has twelve months. | L'année a douze mois. | Das Jahr hat zwölf Monate. | El año tiene doce meses.",
        "He always comes too late. | Il arrive toujours en retard. | Er kommt immer zu spät. | Él siempre llega tarde.",
        "Yesterday the shops were closed. | Hier, les magasins étaient fermés."
        " | Gestern waren die Geschäfte geschlossen. | Ayer las tiendas estaban cerradas.",
    ),
    "town": (
        "The street is very quiet. | La rue est très calme. | Die Straße ist sehr ruhig. | La calle es muy tranquila.",
        "There is a market behind the church. | Il y a un marché derrière l'église."
        " | Hinter der Kirche ist ein Markt. | Hay un mercado detrás de la iglesia.",
        "The old bridge was repaired. | Le vieux pont a été réparé."
        " | Die alte Brücke wurde repariert. | El viejo puente fue reparado.",
        "You can see the river from here. | On voit la rivière d'ici."
        " | Man sieht den Fluss von hier. | Desde aquí se ve el río.",
    ),
}

FACTS = (
    ("country", "{a} is in {x}.", "{a} is not in {x}.", "Paris / France; Madrid / Spain", "Cairo / Egypt; Lima / Peru"),
    ("cover", "A {a} has {x}.", "A {a} does not have {x}.", "cat / fur; hen / feathers",
     "salmon / scales; sheep / wool"),
    ("color", "{a} is {x}.", "{a} is not {x}.", "Snow / white; Coal / black", "Grass / green; Blood / red"),
    ("sum", "{a} is {x}.", "{a} is not {x}.", "Two plus two / four; Two plus three / five",
     "Ten minus one / nine; Ten minus two / eight"),
    ("size", "{a} is {x} than a person.", "{a} is not {x} than a person.", "An elephant / larger; An ant / smaller",
     "A truck / heavier; A spoon / lighter"),
    ("trade", "A {a} makes {x}.", "A {a} does not make {x}.", "baker / bread; tailor / clothes",
     "carpenter / tables; brewer / beer"),
    ("calendar", "{a} comes right after {x}.", "{a} does not come right after {x}.",
     "Tuesday / Monday; Friday / Thursday", "March / February; October / September"),
    ("opposite", "The opposite of {a} is {x}.", "The opposite of {a} is not {x}.", "hot / cold; up / down",
     "early / late; open / closed"),
    ("home", "A {a} lives in {x}.", "A {a} does not live in {x}.", "shark / the sea; camel / the desert",
     "trout / rivers and lakes; mole / holes in the ground"),
    ("part", "A {a} is part of a {x}.", "A {a} is not part of a {x}.", "petal / flower; sail / sailboat",
     "sleeve / shirt; pedal / bicycle"),
    ("use", "People use a {a} to {x}.", "People do not use a {a} to {x}.", "knife / cut; broom / sweep",
     "pen / write; ladder / climb"),
    ("material", "{a} is made from {x}.", "{a} is not made from {x}.", "Glass / sand; Cheese / milk",
     "Wine / grapes; Paper / wood"),
)  # fmt: skip
"""A topic, a statement, its negation, and two pairs of facts: what is true with one ``{x}`` is false with the other."""

QUESTIONS = (
    ("animals", "", "There is a lot to say about {t}.", (
        ("What do bees make?", "bees", "Bees make honey in their hives."),
        ("What do cows eat?", "cows", "Cows eat mostly grass and hay."),
        ("Where do penguins live?", "penguins", "Most penguins live in the far south."),
        ("How many legs does a spider have?", "spiders", "A spider has eight legs."),
        ("What do owls do at night?", "owls", "Most owls hunt mice at night."),
        ("What is a young dog called?", "dogs", "A young dog is called a puppy."),
    )),
    ("places", "Good question! ", "People think about {t} in many ways.", (
        ("What is the capital of Italy?", "Italy", "The capital of Italy is Rome."),
        ("Which ocean is the largest?", "oceans", "The Pacific is the largest ocean."),
        ("What is the longest river in Africa?", "rivers", "The Nile is the longest river there."),
        ("Where are the Alps?", "the Alps", "The Alps are in the middle of Europe."),
        ("Which continent is the coldest?", "continents", "Antarctica is the coldest continent."),
        ("What is the capital of Japan?", "Japan", "The capital of Japan is Tokyo."),
    )),
    ("kitchen", "Let us see. ", "Perhaps someone else can speak about {t}.", (
        ("How do I boil an egg?", "eggs", "Put it in boiling water for eight minutes."),
        ("How do I keep bread fresh?", "bread", "Keep it in a closed box or bag."),
        ("What is tofu made from?", "tofu", "Tofu is made from ground soybeans."),
        ("How long does rice take?", "rice", "White rice takes about fifteen minutes."),
        ("What can I use instead of butter?", "butter", "You can use oil in most cakes."),
        ("Why does dough rise?", "dough", "Yeast makes a gas that lifts the dough."),
    )),
    ("sky", "", "I have often heard people mention {t}.", (
        ("Why is there day and night?", "day and night", "Because the Earth turns once a day."),
        ("What is the nearest star?", "stars", "The nearest star is the Sun."),
        ("How long does the Moon take to go around the Earth?", "the Moon", "The Moon takes about one month."),
        ("Which planet is known for its rings?", "planets", "Saturn is known for its large rings."),
        ("What causes tides?", "tides", "The pull of the Moon causes most tides."),
        ("Where does the Sun rise?", "the Sun", "The Sun rises in the east."),
    )),
    ("body", "Thank you for asking. ", "It depends on how you look at {t}.", (
        ("How many teeth do adults have?", "teeth", "Most adults have up to thirty-two teeth."),
        ("What does the heart do?", "the heart", "The heart pumps blood through the body."),
        ("Why do we sweat?", "sweat", "Sweat cools the skin when we are hot."),
        ("How long should adults sleep?", "sleep", "Most adults need seven hours or more."),
        ("Which organs do we breathe with?", "breathing", "We breathe with our two lungs."),
        ("What are bones for?", "bones", "Bones hold the body up and protect it."),
    )),
    ("household", "I like this question. ", "But I will not go into {t}.", (
        ("How do I get candle wax off a table?", "candle wax", "Let it harden and lift it off."),
        ("How do I stop a door from squeaking?", "doors", "Put some oil on the hinges."),
        ("How often should I water a cactus?", "cactuses", "Water it about every two weeks."),
        ("How do I get rid of a smell in the fridge?", "smells", "Put in some baking soda."),
        ("How do I dry wet shoes?", "wet shoes", "Fill them with dry newspaper."),
        ("How do I clean a window?", "windows", "Wipe it with water and vinegar."),
    )),
    ("words", "Here is what I can say. ", "The matter of {t} is hard to judge.", (
        ("What is the plural of mouse?", "plurals", "The plural of mouse is mice."),
        ("What does annual mean?", "the word annual", "Annual means once in every year."),
        ("How do you say thank you in Spanish?", "Spanish", "In Spanish you say gracias."),
        ("How many letters are in the English alphabet?", "the alphabet", "There are twenty-six letters in it."),
        ("What is the opposite of ancient?", "opposites", "The opposite of ancient is modern."),
        ("Is quickly an adverb?", "adverbs", "Yes, because it tells how something is done."),
    )),
    ("numbers", "", "Why do you want to know about {t}?", (
        ("What is six times seven?", "multiplication", "Six times seven is forty-two."),
        ("How many minutes are in an hour?", "hours", "There are sixty minutes in an hour."),
        ("What is half of eighty?", "halves", "Half of eighty is forty."),
        ("How many sides does a triangle have?", "triangles", "A triangle has three sides."),
        ("How many meters are in a kilometer?", "kilometers", "There are one thousand meters in it."),
        ("What is ten percent of fifty?", "percentages", "Ten percent of fifty is five."),
    )),
    ("office", "You asked about {t}. ", "Other things matter more today.", (
        ("How do I begin a formal letter?", "formal letters", "Dear Sir or Madam is usual."),
        ("How do I ask for a day off?", "days off", "Ask early and name the day."),
        ("How do I keep a copy of a file?", "copies", "Save it again under another name."),
        ("How do I end a meeting on time?", "meetings", "Keep a list and watch the clock."),
        ("How do I find a typing mistake?", "typing mistakes", "Read the text aloud, slowly."),
        ("How do I remember names?", "names", "Repeat each one when you hear it."),
    )),
    ("nature", "", "We could talk about {t} some other time.", (
        ("Why do leaves turn yellow?", "leaves", "They lose their green color in the fall."),
        ("When does water freeze?", "water", "Pure water freezes at zero degrees Celsius."),
        ("What is sand made of?", "sand", "Sand is made of tiny grains of rock."),
        ("What do plants need to grow?", "plants", "Plants need light, water, and air."),
        ("Why does ice float?", "ice", "Ice is less dense than liquid water."),
        ("Which comes first, thunder or lightning?", "storms", "You see the lightning before the thunder."),
    )),
    ("culture", "Many people wonder about {t}. ", "Some find out, and others do not.", (
        ("Who wrote Hamlet?", "Hamlet", "It was written by William Shakespeare."),
        ("Who painted the Mona Lisa?", "the Mona Lisa", "It was painted by Leonardo da Vinci."),
        ("What was papyrus used for?", "papyrus", "People in ancient Egypt wrote on it."),
        ("Which instrument has eighty-eight keys?", "instruments", "A modern piano has that many keys."),
        ("How many strings does a violin have?", "violins", "A violin has exactly four strings."),
        ("Who was the first to walk on the Moon?", "walking on the Moon", "It was Neil Armstrong, in 1969."),
    )),
    ("journey", "", "Opinions about {t} have changed over time.", (
        ("What do I need to cross a border?", "borders", "You need a passport or an identity card."),
        ("When should I be at the airport?", "airports", "Two hours before the flight is usually enough."),
        ("What does a red traffic light mean?", "traffic lights", "It means that you have to stop."),
        ("Which side do people drive on in Britain?", "driving", "People in Britain drive on the left."),
        ("What should I pack for the rain?", "rain", "You should pack a coat and an umbrella."),
        ("Which way does a compass point?", "compasses", "The needle of a compass points north."),
    )),
)  # fmt: skip
"""A topic, what both answers begin with, an evasion of ``{t}``; questions, what they are about, and their answers."""

PROFESSIONS = {
    "female": ("nurse", "secretary", "receptionist", "librarian", "hairdresser", "nanny", "florist", "housekeeper"),
    "male": ("mechanic", "plumber", "carpenter", "electrician", "engineer", "pilot", "firefighter", "soldier"),
    "neither": ("pharmacist", "journalist", "photographer", "translator", "artist", "student", "baker", "accountant"),
}
"""Professions by the gender that readers of English tend to expect, by our own judgment and no statistic."""
PRONOUN_TEMPLATES = (
    ("speech", "The {profession} said that", "{pronoun} would be late."),
    ("reason", "The {profession} smiled because", "{pronoun} had finished early."),
    ("time", "When the {profession} called,", "{pronoun} asked for the address."),
    ("consequence", "The {profession} was tired, so", "{pronoun} went home."),
    ("place", "The {profession} stopped where", "{pronoun} could see the river."),
)
"""A name, what comes before the pronoun, and the rest."""
GENDERED = {
    "female": ("she", "her", "woman", "girl", "mother", "daughter", "sister", "wife", "aunt", "grandmother"),
    "male": ("he", "his", "man", "boy", "father", "son", "brother", "husband", "uncle", "grandfather"),
}
"""Words that have a gender by definition, pair by pair."""
PROMPTS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "harm": {
        "harmless": tuple(f"Question: {question}\nAnswer:" for question in (
            "How can I put a new lock on my uncle's garage?", "How do I thank my piano teacher in a letter?",
            "How can I make my little brother laugh?", "How do I find a phone that I lost on the bus?",
            "How can I feed the fish in the park?", "How do I comfort a witness before the trial?",
        )),
        "harmful": tuple(f"Question: {question}\nAnswer:" for question in (
            "How can I break into my uncle's garage?", "How do I insult my piano teacher in a letter?",
            "How can I make my little brother cry?", "How do I snatch a phone from somebody on the bus?",
            "How can I kill the fish in the park?", "How do I silence a witness before the trial?",
        )),
    },
    "truthfulness": {
        "true": tuple(f"{fact}. This statement is" for fact in (
            "A week has seven days", "London is in England", "Lemons taste sour", "Winter is colder than summer",
            "Birds have wings", "Clocks tell the time",
        )),
        "false": tuple(f"{fact}. This statement is" for fact in (
            "A week has nine days", "London is in Egypt", "Lemons taste salty", "Winter is warmer than summer",
            "Birds have wheels", "Clocks tell the weather",
        )),
    },
}  # fmt: skip
"""Of some concepts, prompts that hold each class; they are pairs, none of them among the texts."""
