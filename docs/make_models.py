"""`make models`: measures every model type of transformers, and writes api/model_support.json.

python docs/make_models.py                all types, over all cores: some minutes
python docs/make_models.py qwen3 lfm2     these, printed; the file stays as it is
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainmaster.api.model_support import Support

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))


def main(names: list[str]) -> None:
    """Prints a line a type, then counts by column."""
    import transformers
    from tiny_models import model_types, others
    from trainmaster.api.model_support import FILE, Column, Packing, Support, to_json

    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    supports: list[Support] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for support in pool.map(_measure, names or model_types()):
            supports.append(support)
            _say(f"{support.model_type:24s} {json.dumps(to_json(support))}")
    for column in Column:
        _say(f"{column.value:10s} {sum(support.passes(column) for support in supports):4d} of {len(supports)}")
    alone = sum(support.way is not None and support.way.packing is Packing.ALONE for support in supports)
    _say(f"one sequence a call: {alone}; not at all: {sum(support.way is None for support in supports)}")
    _say(f"{time.monotonic() - started:.0f} s")
    if not names:
        supports += [Support(name, None, reason) for name, reason in others().items()]
        types = {support.model_type: to_json(support) for support in sorted(supports, key=lambda each: each.model_type)}
        table = {"transformers": transformers.__version__, "types": types}
        FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        _say(f"wrote {FILE.relative_to(ROOT)}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _measure(model_type: str) -> Support:
    import torch
    from model_checks import measure

    torch.set_num_threads(1)
    try:
        return measure(model_type)
    except Exception as error:  # noqa: BLE001  (many of foreign errors do not pass between processes)
        raise RuntimeError(f"{model_type}: {type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
