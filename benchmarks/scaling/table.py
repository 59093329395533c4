"""The model's answers as markdown."""

from collections.abc import Iterable, Sequence

from benchmarks.scaling.model import Epoch, collector_limit, saturating_servers, sync_seconds
from benchmarks.scaling.parts import QWEN_1_5B, QWEN_7B, Architecture, Assumptions, Cluster, HostCosts
from benchmarks.scaling.scenarios import APART, DEMO, DEMO_MEASURED, LONG, SCENARIOS, SHORT, USUAL, Scenario

SERVERS = (2, 4, 8, 16, 32, 64, 128)
RANKS = (8, 16, 32, 64, 128)
LENGTHS = (32, 128, 512, 2048)


def markdown(host: HostCosts, measured: bool) -> str:
    """All tables.

    Args:
        host: Costs of the first process.
        measured: Whether they are those of ``benchmarks/performance.json``.
    """
    source = "from `benchmarks/performance.json`" if measured else "processor time on one core of a busy 2 GHz Xeon"
    parts = [
        f"First process ({source}): {1e3 * host.episode:.2f} ms an episode and {1e6 * host.sampled_token:.2f} us a "
        f"sampled token in the collector, {1e6 * host.packed_token:.2f} us a token of a sequence in packing, "
        f"{1e6 * host.handed_token:.2f} us a packed token handed to another process.",
        "### Phases of an epoch, seconds",
        phases(SCENARIOS, host),
        "### What to buy next, seconds of an epoch",
        purchases(SCENARIOS, host),
        "### Servers for long answers: 7B, 8 trainers, seconds",
        sweep(SCENARIOS[0], host),
        "### Sync, seconds",
        syncs(),
        "### Where the collector becomes the bound",
        limits(host),
        "### The same arithmetic for the demo, seconds",
        check(host),
    ]
    return "\n\n".join(parts) + "\n"


def phases(scenarios: Sequence[Scenario], host: HostCosts) -> str:
    """A row a scenario."""
    head = ["", "engine", "collector", "packing", "train", "gradients", "sync", "sleep", "in turn", "ahead", "bound"]
    rows = []
    for scenario in scenarios:
        e = scenario.epoch(host)
        numbers = (e.engine, e.collector, e.packing, e.train, e.gradients, e.sync, e.sleep, e.in_turn, e.ahead)
        rows.append([scenario.name, *map(_seconds, numbers), e.bound])
    return _table(head, rows)


def purchases(scenarios: Sequence[Scenario], host: HostCosts) -> str:
    """The fastest epoch with what there is, with twice the servers, and with twice the trainers."""
    rows = []
    for scenario in scenarios:
        if scenario.cluster.colocated:
            continue
        servers, trainers = scenario.cluster.servers, scenario.cluster.trainers
        now, more, other = (
            _best(scenario.epoch(host, **change))
            for change in ({}, {"servers": 2 * servers}, {"trainers": 2 * trainers})
        )
        gain = {"servers": now / more, "trainers": now / other}
        best = max(gain, key=gain.__getitem__)
        advice = best if gain[best] > 1.05 else "neither"
        rows.append([scenario.name, _seconds(now), _seconds(more), _seconds(other), advice])
    return _table(["one step ahead", "as it is", "twice the servers", "twice the trainers", "what helps"], rows)


def sweep(scenario: Scenario, host: HostCosts) -> str:
    """A scenario with other numbers of servers."""
    rows = []
    for servers in SERVERS:
        e = scenario.epoch(host, servers=servers)
        ahead = _best(e)
        numbers = [_seconds(v) for v in (e.rollout, e.training, e.sync, e.in_turn, ahead)]
        rows.append(
            [str(servers), *numbers, f"{e.in_turn / ahead:.2f}", "rollout" if e.rollout > e.training else "training"]
        )
    head = ["servers", "rollout", "training", "sync", "in turn", "ahead", "gain of looking ahead", "longer"]
    return _table(head, rows)


def syncs(architectures: Iterable[Architecture] = (QWEN_1_5B, QWEN_7B)) -> str:
    """Seconds of a publication by rank, model and number of servers."""
    rows = []
    for arch in architectures:
        for rank in RANKS:
            given = Assumptions(rank=rank)
            by_servers = [
                _seconds(sync_seconds(arch, Cluster(8, servers, APART.accelerator), given)) for servers in (1, 8, 64)
            ]
            rows.append([arch.name, str(rank), f"{4e-6 * arch.adapter_parameters(rank):.0f}", *by_servers])
    return _table(["model", "rank", "adapter, MB", "1 server", "8 servers", "64 servers"], rows)


def limits(host: HostCosts) -> str:
    """The most that the collector takes, by the length of answers, and which engines bring as much."""
    rows = [[f"{length:,}", f"{collector_limit(host, length):,.0f}"] for length in LENGTHS]
    reached = [
        f"{name} answers: {saturating_servers(QWEN_7B, APART, work, USUAL, host) or 'never'}"
        for name, work in (("short", SHORT), ("long", LONG))
    ]
    return (
        _table(["tokens of an answer", "sampled tokens a second at most"], rows)
        + f"\n\nServers (7B, H100) with which the collector first takes longer than they do: {'; '.join(reached)}."
    )


def check(host: HostCosts) -> str:
    """The demo: the arithmetic's limit with every share 1, and what was measured."""
    e = DEMO.epoch(host)
    limit = {"rollout": e.rollout, "training": e.training}
    rows = [
        [name, _seconds(limit[name]), _seconds(seconds), f"{limit[name] / seconds:.2f}"]
        for name, seconds in DEMO_MEASURED.items()
    ]
    return _table(["phase", "no faster than", "measured", "share of the limit"], rows)


def _best(found: Epoch) -> float:
    return found.in_turn if found.ahead is None else found.ahead


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
