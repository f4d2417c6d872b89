"""What a trained SAE found: metrics on held-out rows, distributions over layers, pictures."""
