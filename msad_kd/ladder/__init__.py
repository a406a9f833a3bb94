"""Ladders of teachers (MTPD): train them and make their controls."""

from msad_kd.ladder.controls import control_stages, write_start
from msad_kd.ladder.run import run_ladder

__all__ = [name for name in globals() if not name.startswith("_")]
