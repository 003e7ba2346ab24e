"""What guests do whose users wait for them: closed-loop workloads, one model each.

Unlike the patterns of :mod:`simkvm.scenario.access`, a vCPU works off jobs (requests, bursts,
pieces of a scan) that arrive when something else is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from simkvm.scenario.fields import Duration, Model, Size, Span
from simkvm.units import MIB

Law = Literal["constant", "exponential"]


class Workload(Model):
    """What all of them have. ``unit``: what their throughput is counted in."""

    unit: ClassVar[str] = "requests"
    warmup: Duration = Field(
        default=0,
        description="Time from the end of `load` on whose answers and work do not count in the "
        "results.",
    )
    hot_pages: int = Field(
        default=40,
        ge=0,
        description="Pages of kernel, stacks and buffers that every job works with. They are never "
        "unmapped; after an invalidation of all translations each has to be looked up again.",
    )
    hot_interval: Span = Field(
        default=5_000,
        description="How long a working vCPU takes to come by each of its hot pages once.",
    )
    load: bool = Field(
        default=True,
        description="Whether the vCPUs first write all the memory that the workload uses, as fast "
        "as it takes that, and begin when all have done so. In a guest that is `mapped` they need "
        "not. If false, a page that is read first is the zero page.",
    )


class Memcached(Workload):
    """A key-value server with worker threads on each vCPU, and clients that wait for their answers.

    As memcached with memtier_benchmark: a connection belongs to one worker for good and has one
    request under way; a worker serves its connections first come first served. Items lie in slab
    chunks in the order of their keys, which is the order in which memtier inserts them.
    """

    pattern: Literal["memcached"] = "memcached"
    clients: int = Field(
        default=200, ge=1, description="Connections, dealt out to the vCPUs in turn."
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="Worker threads of each vCPU, to which its connections are dealt out in turn. "
        "They run one request after the other; only where a guest has `async_pf` does one go on "
        "while another waits for a page.",
    )
    keys: int = Field(default=100_000, ge=1, description="Keys, all of which are stored.")
    value_size: Size = Field(
        default=1024, le=MIB // 2 - 1024, description="Bytes of a value (memtier: --data-size)."
    )
    get_ratio: float = Field(
        default=0.9, ge=0, le=1, description="Share of the requests that read; the rest write."
    )
    keys_drawn: Literal["random", "zipf", "gaussian"] = Field(
        default="random",
        description="How often each key is asked for: all alike, the k-th of them k**-exponent as "
        "often, or the middle ones most (memtier: --key-pattern R, Z, G).",
    )
    exponent: float = Field(
        default=0.99, ge=0, le=10, description="Of zipf (memtier: --key-zipf-exp)."
    )
    sd: float | None = Field(
        default=None,
        gt=0,
        description="Of gaussian: standard deviation in keys (memtier: --key-stddev); null: a "
        "sixth of the keys.",
    )
    service: Duration = Field(
        default=15_000,
        description="CPU time of a request apart from its touches of table and item, half of it "
        "before them.",
    )
    service_law: Law = Field(
        default="constant",
        description="Whether `service` is always the same, or the mean of draws.",
    )
    network: Duration = Field(
        default=50_000,
        description="Time that a request and its answer spend on the way, together: always the "
        "same, and part of the latency.",
    )
    think: Duration = Field(
        default=0,
        description="A client's own time between an answer and its next request.",
    )
    think_law: Law = Field(
        default="constant", description="Whether `think` is always the same, or the mean of draws."
    )
    requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests of each client; null: endless, which needs `duration`.",
    )


class Sort(Workload):
    """A sort in two stages, as Spark's: scan and shuffle, with a barrier behind each.

    In the scan each vCPU reads its partition of the data in order and writes as much. In the
    shuffle it reads its share of every vCPU's output, by blocks in random order, and writes that in
    order over its partition of the data. The guest needs memory for the data twice.
    """

    unit: ClassVar[str] = "bytes"
    pattern: Literal["sort"] = "sort"
    data: Size = Field(description="Bytes to sort, a multiple of the page size.")
    block: Size = Field(default=MIB, description="Bytes that a shuffle reads in order.")
    page_cpu: Duration = Field(
        default=20_000, description="CPU time for each page read, apart from the touches."
    )
    rounds: int = Field(default=1, ge=1, description="Times that both stages are gone through.")


class Chase(Workload):
    """Loads that depend on one another, each from another page, as multichase does."""

    unit: ClassVar[str] = "loads"
    pattern: Literal["chase"] = "chase"
    loads: int | None = Field(
        default=None, ge=1, description="Loads of each vCPU; null: endless, which needs `duration`."
    )
    order: Literal["cycle", "random"] = Field(
        default="cycle",
        description="One random cycle through all pages, the same every time, or any page each "
        "time.",
    )
    span: Literal["vcpu", "guest"] = Field(
        default="vcpu", description="Whether each vCPU has a share of the memory, or all have all."
    )
    load_time: Span | None = Field(
        default=None, description="Time of a load; null: a miss to local memory (dram_local_ns)."
    )


class Interactive(Workload):
    """Somebody at a machine with many tabs open, one of them in the foreground.

    A visit to a tab begins with a burst on every vCPU that touches the tab's working set once, then
    come bursts that touch a part of it, with pauses between. Then the next tab is visited. A burst
    is a request; its latency is the time from the input to the end of the work.
    """

    pattern: Literal["interactive"] = "interactive"
    tabs: int = Field(default=8, ge=1, description="Tabs that are open.")
    tab_size: Size = Field(description="Memory of a tab.")
    working_set: float = Field(
        default=0.5, gt=0, le=1, description="Share of a tab's pages that a visit works with."
    )
    order: Literal["turn", "random"] = Field(
        default="turn", description="Tabs are visited in turn, or any other one each time."
    )
    bursts: int = Field(
        default=20, ge=0, description="Bursts of each vCPU in a visit, after the first one."
    )
    burst_pages: int = Field(default=64, ge=1, description="Touches of such a burst.")
    burst_cpu: Duration = Field(
        default=2_000_000, description="CPU time of a burst, spread over its touches."
    )
    pause: Duration = Field(
        default=50_000_000, description="Mean time between two bursts of a vCPU, exponential."
    )
    idle: Duration = Field(default=0, description="Time between two visits, with nothing to do.")
    write_ratio: float = Field(
        default=0.3, ge=0, le=1, description="Share of the touches that write."
    )
    visits: int | None = Field(
        default=None, ge=1, description="Visits in all; null: endless, which needs `duration`."
    )


AnyWorkload = Memcached | Sort | Chase | Interactive
ENDLESS: Mapping[str, str] = {"memcached": "requests", "chase": "loads", "interactive": "visits"}
"""The key of a workload that is null if it never ends."""
