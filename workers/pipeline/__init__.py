"""Pipelines are programs: instructions as data, schedules as pure functions, one runner for all."""
