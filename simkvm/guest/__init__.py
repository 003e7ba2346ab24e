"""Guests: vCPUs, what they touch, and traces of real programs."""
