"""The commands: each a thin file with a `main`, begun by `python -m jax_resnet COMMAND`."""
