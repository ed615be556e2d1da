"""What each step measures: a module for each, with ``run(context, *what)``."""
