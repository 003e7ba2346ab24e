"""What the model is held against: closed forms, published measurements, traces of a real kernel."""
