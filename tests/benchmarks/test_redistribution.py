"""The benchmark itself, on a few workers: what it says of a plan that is known to send no more than is needed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "redistribution.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_redistribution", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("has_stages", [False, True])
def test_a_small_plan_is_judged(benchmark: ModuleType, has_stages: bool):
    figures = benchmark.planned(benchmark.draw(2 * benchmark.GROUP_SIZE, 64, 0, has_stages))
    assert figures["bytes_received_over_lower_bound"] == 1.0
    assert figures["inter_host_over_lower_bound"] == pytest.approx(1.0, abs=0.05)
    assert figures["max_sent_over_mean"] >= 1.0
    assert figures["parcels_per_worker"] >= 1
    assert 0 < figures["largest_payload_bytes"] < 65_536
