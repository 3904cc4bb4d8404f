"""Tokens to text: characters are never cut, and a stop string never shows, whole or in part."""

import codecs


class TextStream:
    """The text of one sequence as it grows.

    Bytes of an unfinished character are held back, and so is a tail that may become a stop string.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that is safe to show after these bytes. Sets `stopped` at a stop string."""
        text = self._decoder.decode(piece)
        if not self._stops:
            return text
        return self._release(self._held + text)

    def finish(self) -> str:
        """What was held back, once no more will come."""
        if self.stopped:
            return ""
        rest = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return self._cut(rest)

    def _release(self, text: str) -> str:
        shown = self._cut(text)
        if self.stopped:
            self._held = ""
            return shown
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> str:
        """The text before the stop string that is complete first, as if letters came one by one."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return text
        self.stopped = True
        return text[: min(found)[1]]

    def _partial(self, text: str) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
