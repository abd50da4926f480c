"""The networks: layers, residual blocks, the ResNet they make up, and the table of named variants."""
