"""A trained run without its dataset: its weights for other programs."""
