"""The public ops, one file an op family: arguments are checked, a backend is chosen, memory is made."""
