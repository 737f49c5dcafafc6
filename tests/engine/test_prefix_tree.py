from __future__ import annotations

import random
from typing import Any

import pytest

from pagedattn.engine import prefix_tree
from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.prefix_tree import PrefixHashes, PrefixTree
from tests.engine.test_block_manager import make_request


def hashed(token_ids: list[int], salt: str = "", block_size: int = 4) -> PrefixHashes:
    hashes = PrefixHashes(block_size, salt)
    hashes.extend(token_ids)
    return hashes


def test_a_digest_stands_for_all_tokens_before_it_and_the_salt() -> None:
    tokens = list(range(12))
    digests = hashed(tokens).digests
    assert [len(digest) for digest in digests] == [32] * 3
    assert len(set(digests)) == 3
    assert hashed([*tokens[:11], 99]).digests[:2] == digests[:2]
    others = [hashed([99, *tokens[1:]]), hashed(tokens, salt="a"), hashed(tokens, salt="b")]
    everything = [digest for hashes in (hashed(tokens), *others) for digest in hashes.digests]
    assert len(set(everything)) == len(everything)


def test_only_full_blocks_are_hashed_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_hashed: list[int] = []
    sha256 = prefix_tree.sha256

    def count(data: bytes) -> Any:
        num_hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(prefix_tree, "sha256", count)
    hashes = PrefixHashes(4, "salt")
    tokens: list[int] = []
    for token in range(23):
        tokens.append(token)
        hashes.extend(tokens)
        assert len(hashes.digests) == len(tokens) // 4
    assert hashes.digests == hashed(tokens, "salt").digests
    assert num_hashed[:6] == [4, 48, 48, 48, 48, 48]  # the salt, then blocks of 16 bytes after 32 of their parent


class SameDigest:
    def __init__(self, data: bytes) -> None: ...

    def digest(self) -> bytes:
        return b"same"


@pytest.mark.parametrize(
    "other", [hashed([1, 2, 3, 4], block_size=4), hashed([1, 2, 3, 5], salt="a"), hashed([1, 2, 3, 4], salt="")]
)
def test_equal_digests_of_other_tokens_or_salts_are_told_apart(other: PrefixHashes) -> None:
    tree = PrefixTree(num_groups=1)
    known = hashed([1, 2, 3, 4], salt="a")
    other.digests = list(known.digests)
    node = tree.child(None, known.digests[0], known.contents[0])
    assert node is not None
    assert tree.walk(known, 1) == [node]
    assert tree.walk(other, 1) == []
    assert tree.child(None, other.digests[0], other.contents[0]) is None


def test_equal_blocks_after_different_parents_are_told_apart() -> None:
    tree = PrefixTree(num_groups=1)
    known = hashed([1, 2, 3, 4, 5, 6, 7, 8])
    other = hashed([9, 2, 3, 4, 5, 6, 7, 8])
    other.digests[1] = known.digests[1]
    parent = tree.child(None, known.digests[0], known.contents[0])
    tree.child(parent, known.digests[1], known.contents[1])
    stranger = tree.child(None, other.digests[0], other.contents[0])
    assert tree.walk(other, 2) == [stranger]
    assert tree.child(stranger, other.digests[1], other.contents[1]) is None


def test_a_prompt_of_32k_tokens_is_found_but_for_its_last_block() -> None:
    """``benchmarks.scheduler_cost`` says in what time."""
    generator = random.Random(0)
    tokens = [generator.randrange(50_000) for _ in range(32_768)]
    manager = BlockManager(4096, 16, enable_prefix_caching=True)
    first = make_request("first", tokens)
    manager.expect(first)
    prefix = manager.find_prefix(first)
    assert prefix is not None
    assert manager.admit(first, prefix, 32_768)
    first.num_computed_tokens = 32_768
    manager.commit(first)
    again = make_request("again", tokens)
    manager.expect(again)
    prefix = manager.find_prefix(again)
    assert prefix is not None
    assert prefix.num_tokens == 32_752
