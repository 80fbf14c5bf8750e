"""Measurements: KDA implementations side by side (kda.py), and a teacher beside its hybrid (ttft.py).

A measurement returns plain data, a dictionary that is also its JSON; render.py turns it into tables and Markdown.
"""
