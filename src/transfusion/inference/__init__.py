"""The network as generation uses it: a cache, blocks read behind it, and the loops that draw one image or one token."""
