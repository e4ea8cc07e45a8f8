"""Measuring the devices that are here: what to measure, how it is timed, and what becomes of it."""
