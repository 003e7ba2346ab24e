"""Clients that wait for their answers against closed queueing networks.

One worker and its connections are a single server with a finite source: M/M/1//N or M/D/1//N, as
the clients think for exponential times. Nothing of the guest is in the way: all memory is mapped,
and a worker wakes up at once. What is not drawn at all obeys the bound of any closed network to the
nanosecond once the first round is over: each client is answered once in Z + S, or the server is
always busy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from simkvm.units import MIB
from simkvm.validate import queueing
from simkvm.validate.closed_form import SEED, ClosedForm, Estimate, exactly, replicated
from simkvm.validate.theory_worlds import MS, run

REPLICATIONS = 20
SERVICE_NS = 20_000
TOUCH_NS = 10  #: one of the bucket, one of the item
TOUCHES_NS = 2 * TOUCH_NS
THINK_NS = 100_000
ROUNDS = 1000  #: answers of each client in the run that draws nothing


def closed_forms() -> list[ClosedForm]:
    """Throughput and mean latency by law of service and number of clients; the bounds."""
    return [
        *_drawn("constant", 8),
        *_drawn("exponential", 3),
        *(_bound(clients) for clients in (2, 8)),
    ]


def _server(clients: int, **keys: Any) -> dict[str, Any]:
    """A guest with one worker, in which every item lies within a page."""
    access = {
        "pattern": "memcached",
        "clients": clients,
        "keys": 100,
        "value_size": 32,
        "get_ratio": 1.0,
        "network": 0,
        "think": THINK_NS,
        "hot_pages": 0,
        **keys,
    }
    return {"memory": 2 * MIB, "mapped": True, "access": access}


MACHINE = {"base": "ampere-altra-80c", "set": {"page_touch_ns": TOUCH_NS, "wakeup_ns": 0}}


# -- drawn -----------------------------------------------------------------------------------------


def _drawn(law: str, clients: int) -> list[ClosedForm]:
    service = SERVICE_NS + TOUCHES_NS
    rate = queueing.machine_repair(clients, THINK_NS, service, _transform(law))
    source = "Takacs, Introduction to the Theory of Queues (1962), chapter 5: M/G/1//N"
    return [
        ClosedForm(
            f"requests/{law}/{clients}/throughput",
            f"{clients} clients of one worker, {law} service: answers",
            "/s",
            rate * 1e9,
            partial(_measured, law, clients, "requests_per_s"),
            source,
        ),
        ClosedForm(
            f"requests/{law}/{clients}/latency",
            f"{clients} clients of one worker, {law} service: mean latency",
            "us",
            (clients / rate - THINK_NS) / 1000,
            partial(_measured, law, clients, "latency_mean_ns", 1e-3),
            f"{source}; Little's law",
        ),
    ]


def _transform(law: str) -> queueing.Transform:
    """Of a request's service: drawn or not, and its touches."""
    if law == "constant":
        return queueing.constant(SERVICE_NS + TOUCHES_NS)
    drawn, touches = queueing.exponential(SERVICE_NS), queueing.constant(TOUCHES_NS)
    return lambda s: drawn(s) * touches(s)


def _measured(law: str, clients: int, column: str, scale: float = 1.0) -> Estimate:
    """Of independent replications, each some thousands of requests long."""
    guest = _server(
        clients,
        service=SERVICE_NS,
        service_law=law,
        think_law="exponential",
        warmup=5 * MS,
    )
    records = (
        run(guest, machine=MACHINE, seed=SEED, replication=number, duration=105 * MS)
        for number in range(REPLICATIONS)
    )
    return replicated([float(record.summary[column]) * scale for record in records])


# -- not drawn -------------------------------------------------------------------------------------


def _bound(clients: int) -> ClosedForm:
    """Asymptotic bounds meet where nothing varies: min(N / (Z + S), 1 / S)."""
    service = SERVICE_NS + TOUCHES_NS
    cycle = max(THINK_NS + service, clients * service)
    return ClosedForm(
        f"requests/bound/{clients}",
        f"{clients} clients, nothing drawn: answers in {ROUNDS} rounds",
        "answers",
        ROUNDS * clients,
        partial(_answers, clients, cycle),
        "Lazowska et al., Quantitative System Performance (1984), eq. 5.1: the bound is reached",
        drawn=False,
    )


def _answers(clients: int, cycle_ns: int) -> Estimate:
    """Answers in :data:`ROUNDS` cycles behind the first ones."""
    begin = 10 * cycle_ns
    guest = _server(clients, service=SERVICE_NS, warmup=begin)
    record = run(guest, machine=MACHINE, seed=SEED, duration=begin + ROUNDS * cycle_ns)
    return exactly(float(record.summary["requests"]))
