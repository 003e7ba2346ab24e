"""What the models of all KVM selftests share, and the virtual machines that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, PrivateAttr

from simkvm.scenario.fields import Model, Size
from simkvm.scenario.guest_modes import DEFAULT_MODE, MODES, GuestMode
from simkvm.units import KIB, exact_size

GRANULES = (4 * KIB, 16 * KIB, 64 * KIB)


@dataclass(frozen=True)
class Vm:
    """A virtual machine that a test makes: sizes in bytes, ``base`` guest-physical.

    ``overlap``: whether its vCPUs touch the same pages. ``memslots``: of equal size, what is left
    over belongs to the last.
    """

    vcpus: int
    memory: int
    page_size: int
    ipa_bits: int
    base: int
    mapping: int
    folio: int
    overlap: bool = False
    memslots: int = 1


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def whole(size: int, unit: int) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


Vcpus = Annotated[int, Field(ge=1, le=512)]
Pin = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_tuple)]


class Selftest(Model):
    """What every selftest has."""

    vcpus_key: ClassVar[str] = "vcpus"
    memory_key: ClassVar[str] = "vcpu_memory"
    #: What it does to its guest, as contenders say it (:mod:`simkvm.scenario.leaf_sizes`).
    resizes: ClassVar[bool] = False
    logs: ClassVar[bool] = False
    #: Whether all of the guests' memory is written to before the test begins.
    fills: ClassVar[bool] = False
    _arch: str = PrivateAttr("arm64")

    host_page_size: Size | None = Field(
        default=None,
        description="Page size of the host's kernel and so of stage 2 (getpagesize()); null: the "
        "guest's, which `mode` decides.",
    )

    @property
    def guest_mode(self) -> GuestMode:
        """Address bits and page size of the guest."""
        return MODES[DEFAULT_MODE[self._arch]]

    def on(self, arch: str) -> Self:
        """The same test, built for ``arch``: that decides the guest mode, unless a key does."""
        built = self.model_copy()
        built._arch = arch
        return built

    @property
    def page_size(self) -> int:
        """Page size of the host."""
        return self.host_page_size or self.guest_mode.page_size

    def threads(self, cpus: int) -> int:
        """Threads besides the vCPUs' that need a CPU on a host of ``cpus``: the main thread."""
        return 1

    def vms(self, cpus: int) -> Mapping[str, Vm]:
        """The virtual machines, by name, of a test on a host of ``cpus``; vCPUs share CPUs."""
        raise NotImplementedError

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) for what no key can tell alone."""
        if self.page_size not in GRANULES:
            allowed = ", ".join(map(exact_size, GRANULES))
            key = "host_page_size"
            yield key, f"{exact_size(self.page_size)} is no page size: {allowed}"

    def _at_the_top(self, memory: int, align: int) -> int:
        """Where memstress puts its memory: below the top of the guest's addresses."""
        mode = self.guest_mode
        base = (1 << mode.pa_bits) - memory - mode.page_size
        return base // align * align
