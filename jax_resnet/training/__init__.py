"""A config made ready, the loop, the step, and what they are made of."""
