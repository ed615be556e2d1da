"""Ways to correct a plan, each a row of the benchmark."""
