"""The commands: each is a thin file with a `main`, run by `python -m jax_resnet COMMAND`."""
