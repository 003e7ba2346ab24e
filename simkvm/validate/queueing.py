"""Queueing theory: first come first served, one server unless there are channels.

Times are in one unit, rates in its inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb, exp, factorial, lgamma, log, prod

Transform = Callable[[float], float]
"""Laplace-Stieltjes transform of a service time: s to E[exp(-s S)]."""


def constant(service: float) -> Transform:
    """A service that always takes as long."""
    return lambda s: exp(-s * service)


def exponential(service: float) -> Transform:
    """An exponential service of mean `service`."""
    return lambda s: 1 / (1 + s * service)


def mean_wait(load: float, service: float, variability: float) -> float:
    """Mean wait in M/G/1; `variability` is the service's squared coefficient of variation.

    Pollaczek and Khinchine: Kleinrock, Queueing Systems I (1975), eq. 5.70.
    """
    return load * service * (1 + variability) / (2 * (1 - load))


def waits_longer_m_d_1(load: float, services: float) -> float:
    """Share of customers of M/D/1 that wait longer than `services` service times.

    Erlang, Nyt Tidsskrift for Matematik B 20 (1909), 33-39. Unlike the mean wait this depends on
    the order of service.
    """
    steps = range(int(services) + 1)
    terms = (
        (load * (k - services)) ** k / factorial(k) * exp(load * (services - k)) for k in steps
    )
    return 1 - (1 - load) * sum(terms)


def waits_longer_m_m_1(load: float, services: float) -> float:
    """Share of customers of M/M/1 that wait longer than `services` mean service times.

    Kleinrock, Queueing Systems I (1975), section 5.7.
    """
    return load * exp(-(1 - load) * services)


def closed_network(customers: int, think: float, service: float) -> tuple[float, float]:
    """Throughput and mean wait of customers that think, then queue for an exponential server.

    Mean value analysis: Reiser and Lavenberg, J. ACM 27 (1980), 313-322, exact for this network.
    """
    queue = throughput = response = 0.0
    for population in range(1, customers + 1):
        response = service * (1 + queue)
        throughput = population / (think + response)
        queue = throughput * response
    return throughput, response - service


def machine_repair(customers: int, think: float, service: float, transform: Transform) -> float:
    """Throughput of `customers` that think for an exponential time, then queue: M/G/1//N.

    From the mean number of services in a busy period: Takacs, Introduction to the Theory of
    Queues (1962), chapter 5.
    """
    rate = 1 / think
    services = sum(
        comb(customers - 1, i) * prod(1 / transform(j * rate) - 1 for j in range(1, i + 1))
        for i in range(customers)
    )
    return services / (services * service + think / customers)


def mean_wait_m_d_c(load: float, service: float, channels: int) -> float:
    """Mean wait in M/D/c; `load` is that of each of the `channels`, below 1.

    Crommelin, Post Office Electrical Engineers' Journal 25 (1932), 41-50.
    """
    offered, total, term = load * channels, 0.0, 1.0
    services = 0
    while term > 1e-12 * total:
        services += 1
        rate, enough = services * offered, services * channels
        beyond = _poisson_beyond(rate, enough)
        term = _poisson(rate, enough) + beyond - beyond / load
        total += term
    return service * total


def _poisson(rate: float, number: int) -> float:
    return exp(number * log(rate) - rate - lgamma(number + 1))


def _poisson_beyond(rate: float, number: int) -> float:
    """The probability of more than `number`, which is above the mean."""
    total, term = 0.0, _poisson(rate, number)
    while term > 1e-17 * total:
        number += 1
        term *= rate / number
        total += term
    return total


def channels_repair(customers: int, think: float, service: float, channels: int) -> float:
    """Throughput of `customers` that think for an exponential time, then need a channel: M/M/c//N.

    Birth and death: Kleinrock, Queueing Systems I (1975), section 3.9.
    """
    weight = weights = busy = 0.0
    for asking in range(customers + 1):
        working = min(asking, channels)
        weight *= (customers - asking + 1) / think * service / max(working, 1)
        weight = weight if asking else 1.0
        weights += weight
        busy += weight * working
    return busy / weights / service
