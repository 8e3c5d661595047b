"""The master and the control plane. Torch-free at import."""
