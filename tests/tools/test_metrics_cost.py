"""The promise that metrics cost less than one in a hundred of what a process can do."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.core import Engine
from tools import metrics_cost


def test_counting_takes_less_than_a_hundredth_of_a_core():
    engine = Engine(EngineConfig(model=str(metrics_cost.POCKET), variants=("bf16",), kv_cache_tokens=2048))
    for costs in (metrics_cost.api_costs(14_800, engine), metrics_cost.engine_costs(0.004, engine)):
        shares = {name: often * each for name, (often, each) in costs.items()}
        assert 0 < sum(shares.values()) < 0.01, shares
