"""What a user writes, and what master and workers agree on. Torch-free at import."""
