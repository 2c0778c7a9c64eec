"""The parts of attention.py: what is attended with, who computes it, how it is measured, together or apart."""
