"""From text to a store: corpus, tokens, plan, forward passes."""
