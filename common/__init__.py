"""What the papers share: attention and its control, layers, training loop, results, data. Knows no paper."""
