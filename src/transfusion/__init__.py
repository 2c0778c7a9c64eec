"""Transfusion: one transformer trained on text by next-token loss and on images by diffusion, together.

Importing this package imports nothing heavy, so that the command line answers at once.
"""

__version__ = "0.1.0"
