"""Beyond one process: a bounded disk between producer and consumers, and stores served over Arrow Flight."""
