"""The folder of a run: its lock, checkpoints, logs and curves, on a disk or in an object store."""
