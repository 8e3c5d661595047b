"""Models by the name of their repository, out of this machine's Hugging Face cache. Never touches the network.

Qwen/Qwen3-0.6B  ->  ~/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/<commit>
"""

from __future__ import annotations

from pathlib import Path


def is_repository(path: Path) -> bool:
    """Whether it may be the name of a repository (`organisation/model`), and is no directory."""
    return len(path.parts) == 2 and not path.is_absolute() and ".." not in path.parts and not path.exists()


def directory_of(path: Path) -> Path:
    """The directory that `path` names: itself, or the newest snapshot of the repository of this name in the cache.

    Where it is neither, `path` as it is: whoever reads it says what is missing, and `advice` how to get it.
    """
    if not is_repository(path):
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path.as_posix(), "config.json")
    return Path(found).parent if isinstance(found, str) else path


def advice(path: Path) -> str:
    """How to come by what `path` names, as the cure of an error."""
    if is_repository(path):
        return (
            f"name a Hugging Face directory, or a repository that is here: `hf download {path.as_posix()}` fetches it"
        )
    return "name a Hugging Face directory"
