"""Answers that nobody has published: pages that are generated from shipped workloads."""
