"""Wrong inputs, and the one clear error that each of them ends in."""
