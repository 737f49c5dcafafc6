"""Which tokens a cached block holds: hash chains of full blocks, and the tree of those that are in the cache.

A block is known by all tokens up to its end, and by the salt of who may share it: its digest is SHA-256 over its
parent's digest and its own tokens, and the first parent is the salt's. A digest only finds a node. What is compared
before a block is shared are the tokens themselves, block by block from the root, so that two prefixes whose digests
collide never share.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

NO_BLOCK = -1


class PrefixHashes:
    """The digests of one sequence's full blocks, and the bytes that each stands for; ``extend`` as tokens come.

    ``salt``: only sequences of an equal salt share blocks.
    """

    __slots__ = ("_block_size", "_salt", "contents", "digests")

    def __init__(self, block_size: int, salt: str = "") -> None:
        self._block_size = block_size
        self._salt = salt.encode(errors="surrogatepass")  # a salt is any string
        self.digests: list[bytes] = []
        self.contents: list[bytes] = []  # the tokens as int32; those of the first block follow the salt

    def extend(self, token_ids: Sequence[int]) -> None:
        """Hash the full blocks of ``token_ids`` that are not hashed yet; the tokens before them must be the same."""
        block_size, digests, contents = self._block_size, self.digests, self.contents
        start, end = len(digests) * block_size, len(token_ids) // block_size * block_size
        if start >= end:
            return
        parent = digests[-1] if digests else sha256(self._salt).digest()
        tokens = array("i", token_ids[start:end])
        data, width = tokens.tobytes(), block_size * tokens.itemsize
        for offset in range(0, len(data), width):
            content = data[offset : offset + width]
            parent = sha256(parent + content).digest()
            digests.append(parent)
            contents.append(content)
        if start == 0:
            contents[0] = self._salt + contents[0]


class PrefixNode:
    """One block's tokens after those of ``parent``, and where they are cached: a block of each group of layers.

    ``num_dependents``: its children, and the sequences that will extend it.
    """

    __slots__ = ("block_ids", "content", "digest", "num_dependents", "parent")

    def __init__(self, digest: bytes, content: bytes, parent: PrefixNode | None, num_groups: int) -> None:
        self.digest = digest
        self.content = content
        self.parent = parent
        self.num_dependents = 0
        self.block_ids = [NO_BLOCK] * num_groups

    @property
    def has_block(self) -> bool:
        """Whether any group has it cached."""
        return any(block_id != NO_BLOCK for block_id in self.block_ids)

    @property
    def is_needed(self) -> bool:
        return self.num_dependents > 0 or self.has_block


class PrefixTree:
    """All nodes that lead to a cached block or to a sequence that computes one."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self.nodes: dict[bytes, PrefixNode] = {}

    def walk(self, hashes: PrefixHashes, num_blocks: int) -> list[PrefixNode]:
        """The nodes of the first blocks, as far as the tree has them and at most ``num_blocks``."""
        find, path = self.nodes.get, []
        parent = None
        for digest, content in zip(hashes.digests[:num_blocks], hashes.contents, strict=False):
            node = find(digest)
            if node is None or node.content != content or node.parent is not parent:
                break
            path.append(node)
            parent = node
        return path

    def child(self, parent: PrefixNode | None, digest: bytes, content: bytes) -> PrefixNode | None:
        """The node of ``content`` after ``parent``, made if need be; None when its digest stands for other tokens."""
        node = self.nodes.get(digest)
        if node is None:
            node = self.nodes[digest] = PrefixNode(digest, content, parent, self._num_groups)
            if parent is not None:
                parent.num_dependents += 1
        elif node.parent is not parent or node.content != content:
            return None
        return node

    def prune(self, node: PrefixNode | None) -> None:
        """Forget ``node`` if nothing needs it any more, and then its ancestors for whom it was the last."""
        while node is not None and not node.is_needed:
            del self.nodes[node.digest]
            node = node.parent
            if node is not None:
                node.num_dependents -= 1

    def check_integrity(self) -> None:
        """Every node is needed, and its ancestors are there. Raises AssertionError."""
        for digest, node in self.nodes.items():
            assert node.digest == digest, "a node is filed under another digest"
            assert node.is_needed, "a node without blocks, children or a sequence at it is kept"
            assert node.parent is None or self.nodes.get(node.parent.digest) is node.parent, "a node's parent is gone"
