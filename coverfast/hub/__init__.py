"""Backbones on the Hugging Face hub; needs the extra `hub`."""

from coverfast.export.facts import Facts
from coverfast.hub.model import HubBackbone

__all__ = ["Facts", "HubBackbone"]
