"""What turns a record into an image of a batch: on the host, and inside the step."""
