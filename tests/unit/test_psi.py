"""Stall shares by hand (kernel/sched/psi.c, v6.12)."""

from __future__ import annotations
