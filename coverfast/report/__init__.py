"""The pictures of a pretraining run, or of a checkpoint and an image: a folder with an HTML page and PNGs."""

from coverfast.report.colours import dvf_to_rgb
from coverfast.report.gallery import Gallery, on_host
from coverfast.report.metrics import load_metrics
from coverfast.report.page import Entry, write_index, write_report
from coverfast.report.pictures import Pictures

__all__ = ["Entry", "Gallery", "Pictures", "dvf_to_rgb", "load_metrics", "on_host", "write_index", "write_report"]
