"""The only training loop, how it recovers, and what it reports."""
