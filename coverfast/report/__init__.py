"""The pictures of a pretraining run, or of a checkpoint and an image: a folder with an HTML page and PNGs."""

from coverfast.report.colours import dvf_to_rgb
from coverfast.report.metrics import load_metrics
from coverfast.report.page import Entry, write_index, write_report
from coverfast.report.pictures import Pictures

__all__ = ["Entry", "Pictures", "dvf_to_rgb", "load_metrics", "write_index", "write_report"]
