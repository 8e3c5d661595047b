"""Typed requests and replies between the master and its workers, over ZeroMQ."""
