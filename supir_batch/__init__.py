"""Restore archives of images with SUPIR: manifest in, restored derivatives, provenance and a run log out."""

__version__ = "0.1.0"
