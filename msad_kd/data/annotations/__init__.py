"""Annotation files in COCO format: read, checked in one pass, and normalised."""

from msad_kd.data.annotations.annotation_checks import compressed
from msad_kd.data.annotations.columns import whole_number
from msad_kd.data.annotations.reading import (
    check_content,
    parse_json,
    read_annotations,
    read_kept,
    usable_content,
)
