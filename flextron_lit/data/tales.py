"""Made-up English with a structure to learn, for runs that must need no files."""

import random
from collections.abc import Iterator

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Esi", "Finn", "Gita", "Hugo")
ANIMALS = ("cat", "dog", "owl", "fox", "hen", "bee", "carp", "mule")
PLACES = ("mill", "harbour", "garden", "market", "bridge", "tower")
VERBS = {"sees": "saw", "feeds": "fed", "follows": "followed", "paints": "painted", "finds": "found"}
SENTENCES_A_DOCUMENT = 12


def generated_documents(count: int, seed: int) -> Iterator[str]:
    """Short tales: each keeps to its own person, animal and place, so that later sentences follow from earlier ones.

    Args:
        count: number of documents.
        seed: the same seed gives the same documents.
    """
    for index in range(count):
        draw = random.Random(f"{seed}/{index}")
        name, animal, place = draw.choice(NAMES), draw.choice(ANIMALS), draw.choice(PLACES)
        sentences = [f"This is the tale of {name}, a {animal} and a {place}."]
        for _ in range(SENTENCES_A_DOCUMENT):
            present, past = draw.choice(sorted(VERBS.items()))
            number = draw.randrange(2, 9)
            forms = (
                f"{name} {present} the {animal} at the {place}.",
                f"Yesterday {name} {past} the {animal}, and today {name} {present} it again.",
                f"There are {number} days until the {animal} leaves the {place}, then {number - 1}.",
            )
            sentences.append(draw.choice(forms))
        yield " ".join(sentences)
