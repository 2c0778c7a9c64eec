"""Files of sound: what they tell of themselves, and their samples."""
