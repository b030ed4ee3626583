"""A text told piece by piece while its tokens come: no half characters, nothing of a stop, nothing taken back."""

from collections.abc import Callable, Sequence

HALF = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer shows bytes that are no whole character yet."""
Decode = Callable[[Sequence[int]], str]


class Teller:
    """What to tell next.

    Args:
        decode: tokens to text.
        stops: texts that end it, themselves left out.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._told = 0

    def tell(self, tokens: Sequence[int], *, last: bool) -> tuple[str, bool]:
        """What is new, and whether a stop has been said.

        Args:
            tokens: all so far.
            last: whether no more come, so that nothing is held back.
        """
        text = self._decode(tokens)
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            return self._new(text[: min(found)]), True
        return self._new(text if last else text[: len(text) - held_back(text, self._stops)]), False

    def _new(self, text: str) -> str:
        new = text[self._told :]
        self._told = max(self._told, len(text))
        return new


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that later tokens may change, or complete to a stop."""
    halves = len(text) - len(text.rstrip(HALF))
    begun = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(halves, max(begun, default=0))
