"""Top-k sparse autoencoders trained on streamed rows; knows the flow of batches, not where they come from."""
