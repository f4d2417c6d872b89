"""From a store to rows: random access, and shuffled streams in an order nothing can change."""
