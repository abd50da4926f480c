"""Devices and processes: the mesh, joining a job, one fate, signals."""
