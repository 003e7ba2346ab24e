"""The simulated kernel: one mechanism a module, named as Linux names it."""
