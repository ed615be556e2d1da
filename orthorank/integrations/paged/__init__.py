"""A selected layer over a paged cache, for any serving stack: nothing here imports one.

What flows: `steps` says, from the lengths that the host knows, which tokens of a step may be selected and how many;
`choosing` ranks them on the device; `forward` runs the layer on the chosen rows, and `operator` makes that one opaque
operator for graphs; `sinks` keeps the sink's states by first token; `views` reads the stacks' caches.
"""
