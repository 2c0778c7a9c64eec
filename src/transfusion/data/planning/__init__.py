"""Which documents stand in which row of which batch: made from integers alone, before anything is read."""
