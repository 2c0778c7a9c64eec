"""Measurements of a trained model, each named after what it measures, and the report."""
