"""Experiments that a real kernel was traced under, made again in the model."""
