"""What to simulate: scenario files, machines and kernels as data."""
