"""Which sequences share which KV. Pure: a radix tree over tokens, with a count of real cells.

Every sequence that has KV is a path from the root. Two sequences share a part of their paths if
and only if they share cells: sharing begins with `attach`, which stands for a copy of a range
within the cache. Two prompts that were computed side by side have equal tokens on separate paths.

A sequence is *active* while it is worked on, and *kept* after that, until its room is needed:
least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence


class _Node:
    """A run of tokens whose cells the same sequences share."""

    __slots__ = ("active", "children", "keys", "parent", "tokens")

    def __init__(self, parent: "_Node | None", tokens: list[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[int, list[_Node]] = {}
        """By first token; more than one where equal tokens were computed side by side."""
        self.keys: set[int] = set()
        self.active = 0
        """How many of `keys` are active."""


class PrefixIndex:
    """The paths of all sequences of one cache. Keys name sequences."""

    def __init__(self) -> None:
        self.cells = 0
        """Cells that hold KV of some sequence; a shared cell counts once."""
        self.active_cells = 0
        """Those that some active sequence needs."""
        self._root = _Node(None, [])
        self._tips: dict[int, _Node] = {}
        self._active: set[int] = set()
        self._kept: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._tips

    @property
    def kept(self) -> int:
        """How many sequences are kept."""
        return len(self._kept)

    def length(self, key: int) -> int:
        """Tokens of a sequence that have KV."""
        return sum(len(node.tokens) for node in self._path(key))

    def match(self, tokens: Sequence[int], limit: int) -> tuple[int | None, int]:
        """The sequence that shares the longest prefix with `tokens`, and how long that is.

        At most `limit` tokens. (None, 0) where nothing is shared.
        """
        best, longest = self._root, 0
        # Equal tokens may stand side by side, cut in different places: all are looked at.
        open_ends = [(self._root, 0)]
        while open_ends:
            node, length = open_ends.pop()
            if length == limit:
                continue
            for child in node.children.get(tokens[length], ()):
                end = length + _common(child.tokens, tokens, length, limit)
                if end > longest:
                    best, longest = child, end
                if end == length + len(child.tokens):
                    open_ends.append((child, end))
        if not longest:
            return None, 0
        return next(iter(best.keys)), longest

    def add(self, key: int, source: int | None = None, length: int = 0) -> None:
        """A new active sequence, which shares the first `length` tokens of `source`."""
        if key in self._tips:
            raise ValueError(f"{key!r} is here already")
        node, left = self._root, length
        shared = []
        if source is not None:
            for step in self._path(source):
                if left == 0:
                    break
                node = self._split(step, left) if left < len(step.tokens) else step
                left -= len(node.tokens)
                shared.append(node)
            if source in self._kept:
                self._kept.move_to_end(source)
        if left:
            raise ValueError(f"{source!r} has not {length} tokens to share")
        self._tips[key] = node
        self._active.add(key)
        for step in shared:
            self._join(step, key)

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """An active sequence has got KV for further tokens."""
        if not tokens:
            return
        tip = self._tips[key]
        if tip.parent is not None and len(tip.keys) == 1 and not tip.children:
            tip.tokens.extend(tokens)
            self.cells += len(tokens)
            self.active_cells += len(tokens)
            return
        node = _Node(tip, list(tokens))
        tip.children.setdefault(node.tokens[0], []).append(node)
        self._tips[key] = node
        self.cells += len(tokens)
        self._join(node, key)

    def truncate(self, key: int, length: int) -> None:
        """Forget the KV of an active sequence from position `length` on."""
        tip, left = self._root, length
        for step in self._path(key):
            node = step
            if 0 < left < len(step.tokens):
                tip = self._split(step, left)
                left = 0
            elif left:
                left -= len(step.tokens)
                tip = step
                continue
            self._part(node, key)
        self._tips[key] = tip

    def keep(self, key: int) -> None:
        """An active sequence is done; its KV stays until its room is needed."""
        path = self._path(key)
        self._active.discard(key)
        self._kept[key] = None
        for node in path:
            self._count(node, -1)

    def drop(self, key: int) -> None:
        """Forget a sequence, and the cells that only it had."""
        for node in reversed(self._path(key)):
            self._part(node, key)
        del self._tips[key]
        self._active.discard(key)
        self._kept.pop(key, None)

    def touch(self, key: int) -> None:
        """A kept sequence was used just now."""
        self._kept.move_to_end(key)

    def idle_tokens(self, key: int, length: int) -> int:
        """How many of a sequence's first `length` tokens no active sequence needs."""
        idle, left = 0, length
        for node in self._path(key):
            run = min(left, len(node.tokens))
            idle += 0 if node.active else run
            left -= run
            if left == 0:
                break
        return idle

    def oldest(self) -> int | None:
        """The kept sequence that was used least recently."""
        return next(iter(self._kept), None)

    def _path(self, key: int) -> list[_Node]:
        """The nodes of a sequence, from the first tokens on; without the root."""
        nodes = []
        node = self._tips[key]
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def _join(self, node: _Node, key: int) -> None:
        node.keys.add(key)
        self._count(node, 1)

    def _part(self, node: _Node, key: int) -> None:
        """A sequence leaves a node; one that nobody uses any more is removed."""
        node.keys.discard(key)
        if key in self._active:
            self._count(node, -1)
        if not node.keys and node.parent is not None:
            self.cells -= len(node.tokens)
            siblings = node.parent.children[node.tokens[0]]
            siblings.remove(node)
            if not siblings:
                del node.parent.children[node.tokens[0]]

    def _count(self, node: _Node, change: int) -> None:
        before, node.active = node.active, node.active + change
        if bool(before) != bool(node.active):
            self.active_cells += len(node.tokens) if node.active else -len(node.tokens)

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut a node in two; returns the upper one, which has the first `length` tokens."""
        parent = node.parent
        assert parent is not None  # noqa: S101 - the root has no tokens to cut
        upper = _Node(parent, node.tokens[:length])
        upper.keys, upper.active = set(node.keys), node.active
        siblings = parent.children[node.tokens[0]]
        siblings[siblings.index(node)] = upper
        # The lower one stays the object that it was: it is the tip of its sequences.
        node.tokens = node.tokens[length:]
        node.parent = upper
        upper.children = {node.tokens[0]: [node]}
        return upper


def _common(run: list[int], tokens: Sequence[int], start: int, limit: int) -> int:
    """How many tokens of `run` equal `tokens[start:limit]`."""
    most = min(len(run), limit - start)
    if run[:most] == list(tokens[start : start + most]):
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if run[:middle] == list(tokens[start : start + middle]):
            low = middle
        else:
            high = middle - 1
    return low
