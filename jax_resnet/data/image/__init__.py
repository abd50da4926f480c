"""Turn records into the images of a batch: on the host, and inside the step."""
