"""Ablations as data: a question, some configurations that answer it, and a report that anyone can read and repeat."""
