"""Ladders of teachers (MTPD): train them and make their controls."""

from msad_kd.ladder.controls import control_stages, write_start
from msad_kd.ladder.run import run_ladder
