"""Ladders of teachers (MTPD): train them, order the teachers, and make the ladder controls."""

from msad_kd.ladder.adaptation_cost import greedy_order
from msad_kd.ladder.controls import control_stages
from msad_kd.ladder.run import run_ladder

__all__ = ["control_stages", "greedy_order", "run_ladder"]
