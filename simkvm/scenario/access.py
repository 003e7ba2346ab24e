"""What vCPUs touch: the access patterns of a scenario, one model each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from simkvm.scenario.fields import Duration, Model, as_tuple
from simkvm.scenario.workloads import AnyWorkload

Touches = Annotated[
    int | None,
    Field(
        ge=1,
        description="Touches that each vCPU makes, then it stops; null: endless, which needs "
        "`duration`.",
    ),
]
Think = Annotated[
    Duration,
    Field(description="Time between two touches of one vCPU, beyond the touch itself."),
]
WriteRatio = Annotated[
    float, Field(ge=0, le=1, description="Share of the touches that write, 0 to 1.")
]
Repeat = Annotated[
    int | None, Field(ge=1, description="Rounds; null: endless, which needs `duration`.")
]


class Populate(Model):
    """Each vCPU walks through its share of the memory, every page once a round.

    The first touch of kvm's access_tracking_perf_test and dirty_log_perf_test, and the passes of
    max_guest_memory_test (mmu_stress_test from v6.14 on).
    """

    pattern: Literal["populate"] = "populate"
    write: bool = Field(default=True, description="Write (true) or read (false).")
    repeat: int = Field(default=1, ge=1, description="Rounds over the vCPU's share of the memory.")
    every: int = Field(default=1, ge=1, description="Touch only every n-th page (1: all).")
    think: Think = 0


class Uniform(Model):
    """Each vCPU touches pages of the whole guest at random, all equally often."""

    pattern: Literal["uniform"] = "uniform"
    touches: Touches = None
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class Zipf(Model):
    """Each vCPU touches pages of the whole guest at random, the k-th page k**-exponent as often."""

    pattern: Literal["zipf"] = "zipf"
    touches: Touches = None
    exponent: float = Field(
        default=0.99, ge=0, le=10, description="Skew: 0 is uniform, 0.99 is YCSB's."
    )
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class HotCold(Model):
    """Each vCPU touches a hot part of the guest often and the rest seldom."""

    pattern: Literal["hot_cold"] = "hot_cold"
    touches: Touches = None
    hot_ratio: float = Field(default=0.1, gt=0, le=1, description="Hot share of the memory.")
    hot_access_ratio: float = Field(
        default=0.9, ge=0, le=1, description="Share of the touches that go to the hot part."
    )
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class Phases(Model):
    """One pattern after another, each to its end; vCPUs do not wait for one another."""

    pattern: Literal["phases"] = "phases"
    phases: Annotated[tuple[Phase, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1, description="The patterns, in order."
    )
    repeat: Repeat = 1


class Trace(Model):
    """Touches recorded from a real program.

    Each vCPU replays the whole trace on memory of its own: vCPU v's copy begins v footprints
    behind the start, so the guest needs memory for vcpus footprints.
    """

    pattern: Literal["trace"] = "trace"
    file: str = Field(
        min_length=1, description="The trace, relative to the folder of the scenario file."
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Digest of the trace's content; filled in on loading. If given, the trace has "
        "to match it.",
    )
    repeat: Repeat = 1
    think: Think = 0


Touching = Populate | Uniform | Zipf | HotCold | Phases | Trace
Phase = Annotated[Touching, Field(discriminator="pattern")]
Access = Annotated[Touching | AnyWorkload, Field(discriminator="pattern")]
Phases.model_rebuild()
