"""Noise schedule, objective, samplers and guidance: tensors in, tensors out, no parameters."""
