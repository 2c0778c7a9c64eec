"""Training of image codecs, and what is done with a trained one.

Reading order: settings, images, features, losses, codebook, preview, measure, state, train; report, encode.
"""
