"""Backbones on the Hugging Face hub; needs the extra `hub`."""

from coverfast.hub.facts import Facts
from coverfast.hub.model import HubBackbone

__all__ = ["Facts", "HubBackbone"]
