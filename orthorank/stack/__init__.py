"""A model as a stack of layers: losses with states reused, the sink, memory."""
