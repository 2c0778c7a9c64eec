"""What clients send and what they are told."""
