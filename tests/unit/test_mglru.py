"""Generations of the multi-gen LRU (mm/vmscan.c, include/linux/mm_inline.h, v6.12)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from simkvm.kernel.mglru import MAX_LRU_BATCH, MAX_NR_GENS, MIN_LRU_BATCH, MIN_NR_GENS, LruGen


def leaves(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def lru(pages: int = 16, two_step: bool = False, fill: bool = True) -> LruGen:
    made = LruGen(pages, two_step)
    for leaf in range(pages if fill else 0):
        made.add(leaf)
    return made


def sizes(made: LruGen) -> list[int]:
    """Folios by age, the youngest generation first."""
    return [made.sizes[(made.max_seq - age) % MAX_NR_GENS] for age in range(MAX_NR_GENS)]


def test_constants() -> None:
    """include/linux/mmzone.h."""
    assert (MIN_NR_GENS, MAX_NR_GENS, MIN_LRU_BATCH, MAX_LRU_BATCH) == (2, 4, 64, 4096)


def test_a_new_one_has_all_generations_empty() -> None:
    """lru_gen_init_lruvec(): max_seq = MIN_NR_GENS + 1."""
    made = lru(fill=False)
    assert (made.min_seq, made.max_seq) == (0, 3)
    assert made.total == 0


def test_a_fault_brings_a_page_into_the_youngest() -> None:
    made = lru(4)
    assert sizes(made) == [4, 0, 0, 0]
    made.inc_max_seq()
    assert sizes(made) == [0, 4, 0, 0]


def test_what_is_young_moves_to_the_youngest() -> None:
    made = lru(8)
    made.inc_max_seq()
    assert made.promote(leaves(1, 5)) == 2
    assert sizes(made) == [2, 6, 0, 0]


def test_what_is_in_the_youngest_already_does_not_move() -> None:
    """update_batch_size() only if the generation changed: it does not count as batched."""
    made = lru(8)
    made.inc_max_seq()
    made.promote(leaves(1))
    assert made.promote(leaves(1, 2, 3)) == 2
    assert made.promote(leaves(1, 2, 3)) == 0
    assert made.promote(leaves()) == 0
    assert sizes(made) == [3, 5, 0, 0]


def test_two_steps() -> None:
    """v7.x: the first sighting only marks; the second moves, and the mark is used up."""
    made = lru(8, two_step=True)
    made.inc_max_seq()
    assert made.promote(leaves(1, 2)) == 0
    assert made.promote(leaves(2, 3)) == 1
    assert sizes(made) == [1, 7, 0, 0]
    made.inc_max_seq()
    assert made.promote(leaves(2)) == 0, "it has to be seen twice again"
    assert made.promote(leaves(1, 2, 3)) == 3


def test_a_freed_page_forgets_its_mark() -> None:
    made = lru(8, two_step=True)
    made.inc_max_seq()
    made.promote(leaves(4))
    made.remove(leaves(4))
    made.add(4)
    made.inc_max_seq()
    assert made.promote(leaves(4)) == 0


def test_the_oldest_is_emptied_into_the_next_when_all_four_are_in_use() -> None:
    """inc_min_seq(): the folios move up, before the new generation is opened."""
    made = lru(8)
    assert [made.inc_max_seq() for _ in range(3)] == [0, 0, 0]
    assert sizes(made) == [0, 0, 0, 8]
    made.promote(leaves(0, 1))
    assert made.inc_max_seq() == 6
    assert sizes(made) == [0, 2, 0, 6]
    assert (made.min_seq, made.max_seq) == (4, 7)
    assert made.inc_max_seq() == 6


def test_removed_pages_leave_their_generations() -> None:
    made = lru(8)
    made.inc_max_seq()
    made.promote(leaves(0, 1, 2))
    made.remove(leaves(0, 5, 6))
    assert sizes(made) == [2, 3, 0, 0]
    assert made.total == 5


@pytest.mark.parametrize("two_step", [False, True])
def test_same_as_a_plain_model(two_step: bool) -> None:
    """A generation and a mark for each page, in dictionaries; 2 to 4 generations at any time."""
    rng = np.random.default_rng(7)
    made = lru(200, two_step, fill=False)
    generation: dict[int, int] = {}
    marked: set[int] = set()
    oldest, youngest = 0, 3
    for _ in range(400):
        deed = rng.integers(4)
        chosen = rng.choice(200, int(rng.integers(1, 60)), replace=False).tolist()
        here = sorted(leaf for leaf in chosen if leaf in generation)
        if deed == 0:
            for leaf in chosen:
                if leaf not in generation:
                    made.add(leaf)
                    generation[leaf] = youngest
        elif deed == 1:
            made.remove(leaves(*here[:10]))
            for leaf in here[:10]:
                del generation[leaf]
                marked.discard(leaf)
        elif deed == 2:
            seen = {leaf for leaf in here if leaf in marked} if two_step else set(here)
            moved = sum(generation[leaf] != youngest for leaf in seen)
            assert made.promote(leaves(*here)) == moved
            marked = (marked | set(here)) - seen if two_step else marked
            generation |= dict.fromkeys(seen, youngest)
        else:
            full = youngest - oldest + 1 == 4
            up = [leaf for leaf, at in generation.items() if at == oldest] if full else []
            assert made.inc_max_seq() == len(up)
            generation |= dict.fromkeys(up, oldest + 1)
            oldest, youngest = oldest + full, youngest + 1
        assert (made.min_seq, made.max_seq) == (oldest, youngest)
        assert MIN_NR_GENS <= youngest - oldest + 1 <= MAX_NR_GENS
        held = Counter(generation.values())
        assert sizes(made) == [held[youngest - age] for age in range(4)]
        assert made.total == len(generation)
