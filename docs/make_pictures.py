"""Writes the pictures of docs/pipelines.md: one for each schedule, as `trainmaster schedule` draws it.

python docs/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

from trainmaster.workers.pipeline.report import Request, picture

DIRECTORY = Path(__file__).with_name("pictures")
TIMES = "5,6,4"


def pictures() -> dict[str, str]:
    """By file name. Four ranks and eight microbatches throughout, so that they can be compared."""
    drawn = {f"{kind}.svg": _draw(kind) for kind in ("gpipe", "1f1b", "interleaved", "zb-h1", "forward")}
    return drawn | {
        "1f1b-recompute.svg": _draw("1f1b", recompute=True),
        "interleaved-ragged.svg": _draw("interleaved", 6),
    }


def _draw(kind: str, num_microbatches: int = 8, recompute: bool = False) -> str:
    return picture(
        Request(
            kind=kind,
            stages="4",
            microbatches=str(num_microbatches),
            chunks=None,
            times=TIMES,
            comm="0",
            recompute=recompute,
            out=None,
        )
    )


def main() -> None:
    """Writes them."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, drawn in pictures().items():
        (DIRECTORY / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
