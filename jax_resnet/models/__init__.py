"""The networks: layers, residual blocks, the ResNet they form, and the table of named variants."""
