"""Delivery: what a run leaves behind for people: summary, report, export, live progress."""
