"""Experiments that can be run again: one script each, and the figures it gave beside it."""
