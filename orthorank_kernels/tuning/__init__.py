"""Launch settings measured on the GPU at hand: candidates, problems, processes that compile, a whole run."""
