"""The folder of a run: who writes it, what is recorded and shown, files here and in object stores."""
