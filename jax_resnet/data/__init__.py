"""From a dataset's name to batches on the devices; what a batch holds is a function of (seed, step) alone."""
