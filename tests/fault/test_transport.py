"""A run over a connection that loses, repeats, delays and reorders messages comes to the same result."""

from __future__ import annotations

import pytest
from proxy import Proxy
from wire import free_address
from workbench import Workbench

LAYOUT = ("--model.layout.pp", "2", "--run.steps", "6", "--run.evaluate_every", "2")


@pytest.mark.fault
@pytest.mark.parametrize("seed", [0, 1])
def test_results_are_equal_over_a_connection_that_loses_a_tenth(workbench: Workbench, seed: int) -> None:
    done = workbench.run("--run.name", "direct", *LAYOUT)
    assert done.returncode == 0, done.stderr
    front, back = free_address(), free_address()
    with Proxy(front, back, share=0.1, seed=seed) as proxy:
        master = workbench.start("master", str(workbench.file), "--bind", back, "--run.name", "proxied", *LAYOUT)
        workers = [workbench.start("worker", str(workbench.file), "--master", front) for _ in range(2)]
        _, err = master.communicate(timeout=120)
        assert master.returncode == 0, err
        for worker in workers:
            worker.communicate(timeout=30)
    print(f"proxy: {dict(proxy.counts)}")
    assert min(proxy.counts[what] for what in ("dropped", "delayed", "repeated")) > 3
    for key in ("train/loss", "evaluation/loss", "train/gradient_norm"):
        assert workbench.series(key, "proxied") == workbench.series(key, "direct"), key
    assert workbench.wait_until_gone(5.0) == []
