"""What master and workers have in common as services: logging, signals, failpoints, addresses."""
