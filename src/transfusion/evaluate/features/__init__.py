"""Networks whose features rate images: published ones by their weights, and a stand-in."""
