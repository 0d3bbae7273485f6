"""Names for instances that were given none: an adjective and an animal of the hutch."""

from __future__ import annotations

import os

__all__ = ["random_name"]

_FIRST = (
    "able amber brave brisk calm civil clever cosy dapper deft eager early fair fleet fond "
    "fresh gentle glad grand happy hardy ideal jolly keen kind lively loyal lucky mellow merry "
    "mild neat nimble noble patient placid plucky polite proud quick quiet rapid ready robust "
    "rosy serene sharp sleek smart snug solid spry steady sturdy sunny swift tidy trusty vivid "
    "warm wise witty zesty"
).split()
_SECOND = (
    "agouti alpaca badger beaver bilby bison bongo capybara caracal chamois chinchilla civet "
    "coati colobus cony coypu degu dingo dormouse ermine fennec ferret gerbil gopher guanaco "
    "hamster hare hedgehog hyrax ibex jackal jerboa kinkajou koala lemming lemur leveret linsang "
    "llama loris lynx mara marmot marten meerkat mink mole mongoose muskrat numbat ocelot okapi "
    "otter pika polecat possum quokka quoll rabbit raccoon saiga serval shrew sloth squirrel "
    "stoat suricate tamarin tapir tenrec vicuna viscacha vole wallaby weasel wombat zebu zorilla"
).split()


def random_name(attempt: int = 0) -> str:
    """Return a name such as `brisk_otter`; later attempts add a number."""
    first, second, number = os.urandom(1)[0], os.urandom(1)[0], os.urandom(2)
    name = f"{_FIRST[first % len(_FIRST)]}_{_SECOND[second % len(_SECOND)]}"
    return f"{name}{int.from_bytes(number, 'big')}" if attempt else name
