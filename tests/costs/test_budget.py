import pytest

from flextron_lit.costs import CostTable
from flextron_lit.costs.budget import meets, parse_budget
from flextron_lit.space import SubNetwork

FULL, SMALLEST = SubNetwork((1, 2)), SubNetwork((0, 0))
BLOCKS = ((0.0, 20.0), (10.0, 30.0, 40.0))
TABLES = {
    "latency": CostTable("latency", "ms", 40.0, BLOCKS),
    "prefill": CostTable("prefill", "ms", 20.0, ((0.0, 10.0), (5.0, 15.0, 20.0))),
    "parameters": CostTable("parameters", "parameters", 40e6, ((0.0, 20e6), (10e6, 30e6, 40e6))),
    "memory": CostTable("memory", "bytes", 160e6, ((0.0, 80e6), (40e6, 120e6, 160e6))),
    "kv_bytes": CostTable("kv_bytes", "bytes", 0.0, ((1e6, 2e6), (0.0, 0.0, 0.0))),
    "flops": CostTable("flops", "FLOPs", 1e9, ((0.0, 1e9), (0.0, 1e9, 2e9))),
}
COUNTED = {name: table for name, table in TABLES.items() if name not in ("latency", "prefill")}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("0.6", [("latency", 60.0)]),
        ("1", [("latency", 100.0)]),
        ("85ms", [("latency", 85.0)]),
        ("0.085s", [("latency", 85.0)]),
        ("request=85 ms", [("latency", 85.0)]),
        ("prefill<=0.8", [("prefill", 40.0)]),
        ("prefill=30ms", [("prefill", 30.0)]),
        ("90M", [("parameters", 90e6)]),
        ("parameters=0.09B", [("parameters", 90e6)]),
        ("400MB", [("memory", 400e6)]),
        ("300MiB", [("memory", 300 * 2**20)]),
        ("kv_bytes=1.5MB", [("kv_bytes", 1.5e6)]),
        ("3GFLOPs", [("flops", 3e9)]),
        ("latency<=0.6, kv_bytes<=0.5", [("latency", 60.0), ("kv_bytes", 1e6)]),
    ],
)
def test_a_budget_is_read(budget, expected):
    limits = parse_budget(budget, TABLES)
    assert [(limit.table.name, pytest.approx(limit.value)) for limit in limits] == expected


def test_a_ratio_is_of_the_flops_where_no_latency_is_known():
    (limit,) = parse_budget("0.5", COUNTED)
    assert (limit.table.name, limit.value) == ("flops", 2e9)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("fast", "cannot read the budget 'fast'. A ratio"),
        ("", "cannot read the budget ''"),
        ("0.6,", "cannot read the budget ''"),
        ("5 days", "has the unit 'days'; known are ms, s, us"),
        ("0", "must be above 0"),
        ("weight=0.5", "one of weight, but known costs are latency, prefill, parameters"),
        ("decode=3ms", "known costs are .*; measure latencies with `python main.py profile`"),
        ("parameters=3ms", "is in ms, but parameters is counted in parameters"),
        ("0.3", r"no sub-network meets '0.3': the smallest latency possible is 50 ms \(0.500 of .* 100 ms\)"),
        ("20M", r"the smallest parameters possible is 50.0M parameters \(0.500 of"),
        ("0.9,kv_bytes<=0.1", r"no sub-network meets 'kv_bytes<=0.1': the smallest kv_bytes possible is 1.0M bytes"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(budget, TABLES)


def test_the_smallest_cost_counts_not_the_smallest_widths():
    odd = {"latency": CostTable("latency", "ms", 0.0, ((5.0, 3.0, 8.0),))}
    assert parse_budget("3ms", odd)[0].allows(SubNetwork((1,)))
    with pytest.raises(ValueError, match="possible is 3 ms"):
        parse_budget("2.9ms", odd)


def test_all_limits_count():
    limits = parse_budget("0.9,kv_bytes<=0.5", TABLES)
    assert meets(SMALLEST, limits)
    assert not meets(SubNetwork((1, 0)), limits)
    assert not meets(SubNetwork((0, 2)), parse_budget("0.7", TABLES))
    assert meets(SubNetwork((0, 2)), parse_budget("0.8", TABLES))


def test_a_budget_above_the_full_network_is_loose():
    assert parse_budget("1.5", TABLES)[0].loose
    assert parse_budget("1", TABLES)[0].loose
    assert not parse_budget("0.99", TABLES)[0].loose
    assert meets(FULL, parse_budget("2s", TABLES))


def test_a_bare_ratio_is_of_the_cost_that_it_is_told():
    assert [limit.table.name for limit in parse_budget("0.6", TABLES, "flops")] == ["flops"]
    # what names its cost or unit keeps it
    assert [limit.table.name for limit in parse_budget("prefill<=0.8,90M", TABLES, "flops")] == [
        "prefill",
        "parameters",
    ]
