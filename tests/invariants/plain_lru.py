"""The multi-gen LRU in the plainest way: an object a folio, a Python list a list.

Written from mm/vmscan.c, mm/swap.c and mm/workingset.c of v6.12 (and v6.14 where ``reworked``),
with flags as the kernel has them instead of the tables of :mod:`simkvm.kernel.lru_tiers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GENS, BATCH = 4, 64


@dataclass(eq=False)
class Folio:
    leaf: int
    file: bool
    gen: int = -1  #: its generation's number; -1: isolated or nowhere
    on: int = -1  #: the list that it is on
    referenced: bool = False
    workingset: bool = False
    refs: int = 0

    def clear(self, workingset: bool = True) -> None:
        self.referenced, self.refs = False, 0
        if workingset:
            self.workingset = False

    def uses(self, reworked: bool) -> int:
        if reworked:
            return self.refs + 1 if self.referenced else 0
        return self.refs + self.workingset

    def tier(self, reworked: bool) -> int:
        if reworked and self.workingset:
            return 3
        uses = self.uses(reworked) if reworked else self.uses(reworked) + 1
        return 0 if uses <= 1 else 1 if uses == 2 else 2 if uses <= 4 else 3

    def highest(self, reworked: bool) -> bool:
        if reworked:
            return self.uses(True) + self.workingset == 5
        return self.uses(False) == 4


@dataclass
class Shadow:
    seq: int
    refs: int
    workingset: bool


@dataclass
class PlainLru:
    """Two types of folios; lists run from the oldest to the newest."""

    reworked: bool
    max_seq: int = 3
    min_seqs: list[int] = field(default_factory=lambda: [0, 0])
    folios: dict[int, Folio] = field(default_factory=dict)
    shadows: dict[int, Shadow] = field(default_factory=dict)
    back: dict[int, Folio] = field(default_factory=dict)  #: refaulted, not yet added

    def __post_init__(self) -> None:
        self.lists: list[list[list[Folio]]] = [[[] for _ in range(GENS)] for _ in range(2)]

    # -- places -----------------------------------------------------------------------------------

    def place(self, folio: Folio, seq: int, old_end: bool = False) -> None:
        self.take_off(folio)
        folio.gen = folio.on = seq % GENS
        target = self.lists[folio.file][folio.on]
        target.insert(0, folio) if old_end else target.append(folio)

    def take_off(self, folio: Folio) -> None:
        if folio.on >= 0:
            self.lists[folio.file][folio.on].remove(folio)
        folio.on = -1

    def sizes(self, file: int) -> list[int]:
        gens = [folio.gen for folio in self.folios.values() if folio.file == file]
        return [gens.count(gen) for gen in range(GENS)]

    # -- what faults and others do ----------------------------------------------------------------

    def add(self, leaf: int, file: bool) -> None:
        folio = self.back.pop(leaf, Folio(leaf, file))
        self.folios[leaf] = folio
        self.place(folio, self.max_seq - (self.reworked and not folio.workingset))

    def free(self, leaf: int) -> None:
        self.take_off(self.folios.pop(leaf))

    def accessed(self, leaf: int) -> None:
        folio = self.folios[leaf]
        if not folio.referenced:
            folio.referenced = True
            folio.refs = 0 if self.reworked else folio.refs
        elif self.reworked:
            if folio.refs == 3:
                folio.workingset = True
            else:
                folio.refs += 1
        elif not folio.workingset:
            folio.workingset = True
        else:
            folio.refs = min(3, folio.refs + 1)

    def see_young(self, leaf: int, seq: int) -> None:
        folio = self.folios[leaf]
        if self.reworked:
            if not folio.referenced and not folio.workingset:
                folio.referenced, folio.refs = True, 0
            elif folio.gen >= 0:
                folio.clear(workingset=False)
                folio.workingset = True
                folio.gen = seq % GENS
        elif folio.gen < 0:
            folio.referenced = True
        else:
            folio.clear()
            folio.gen = seq % GENS

    # -- generations ------------------------------------------------------------------------------

    def inc_gen(self, folio: Folio) -> None:
        oldest = self.min_seqs[folio.file] % GENS
        if folio.gen == oldest:
            folio.gen = (oldest + 1) % GENS
            folio.clear(workingset=not self.reworked)

    def age(self) -> None:
        for file in (1, 0):
            if self.max_seq - self.min_seqs[file] + 1 == GENS:
                source = self.lists[file][self.min_seqs[file] % GENS]
                while source:
                    folio = source[0]
                    self.inc_gen(folio)
                    self.place(folio, folio.gen, old_end=True)
                self.min_seqs[file] += 1
        self.max_seq += 1

    def advance(self) -> None:
        ends = list(self.min_seqs)
        for file in (0, 1):
            while ends[file] + 2 <= self.max_seq and not self.lists[file][ends[file] % GENS]:
                ends[file] += 1
        if not self.reworked:
            ends[0] = min(ends)
            ends[1] = max(ends[0], self.min_seqs[1])
        elif ends[0] > self.max_seq - 2 > ends[1]:
            ends[0] = self.max_seq - 2
        elif ends[1] > self.max_seq - 2 > ends[0]:
            ends[1] = self.max_seq - 2
        self.min_seqs = ends

    # -- eviction ---------------------------------------------------------------------------------

    def scan(self, file: int, tier: int, waiting: set[int]) -> list[int]:
        if self.max_seq - self.min_seqs[file] + 1 == 2:
            return []
        oldest = self.min_seqs[file] % GENS
        source, isolated = self.lists[file][oldest], []
        while source and len(isolated) < BATCH:
            folio = source[0]
            if folio.gen != oldest:
                self.place(folio, folio.gen)
            elif folio.tier(self.reworked) > tier or folio.highest(self.reworked):
                self.inc_gen(folio)
                self.place(folio, folio.gen, old_end=not self.reworked)
            elif folio.leaf in waiting:
                self.inc_gen(folio)
                self.place(folio, folio.gen)
            else:
                self.take_off(folio)
                folio.gen = -1
                if not folio.referenced:
                    folio.refs = 0
                    folio.workingset = folio.workingset and self.reworked
                folio.referenced = folio.referenced and self.reworked  # for shrink_folio_list()
                isolated.append(folio.leaf)
        return isolated

    def keep(self, leaf: int, used: bool) -> None:
        folio = self.folios[leaf]
        if not self.reworked:
            folio.clear()
            self.place(folio, self.max_seq)
            return
        if used and not folio.referenced and not folio.workingset:
            folio.referenced, folio.refs = True, 0  # lru_gen_set_refs(): kept
            self.place(folio, self.max_seq - 1)
            return
        folio.clear(workingset=False)
        folio.workingset = folio.workingset or used
        self.place(folio, self.max_seq - (not folio.workingset))

    def put_back(self, leaf: int) -> None:
        """It is being written: evict_folios() restores what isolate_folio() cleared."""
        folio = self.folios[leaf]
        if not self.reworked and folio.workingset:
            folio.referenced = True
        self.place(folio, self.max_seq - 1)

    def evict(self, leaf: int) -> None:
        folio = self.folios.pop(leaf)
        token = max(folio.uses(self.reworked) - 1, 0)
        if self.reworked:
            self.shadows[leaf] = Shadow(self.min_seqs[folio.file], token, folio.workingset)
        else:
            flag = folio.uses(False) > 0
            self.shadows[leaf] = Shadow(self.min_seqs[folio.file], token, flag)

    def refault(self, leaf: int, file: bool) -> bool:
        shadow = self.shadows.pop(leaf)
        folio = self.back[leaf] = Folio(leaf, file)
        if self.reworked:
            recent = abs(self.max_seq - shadow.seq) < GENS
        else:
            recent = shadow.seq == self.min_seqs[file]
        if recent and not self.reworked:
            folio.refs, folio.workingset = 3, True
        elif recent and shadow.workingset:
            folio.workingset = True
        elif recent:
            folio.refs = shadow.refs
        return recent
