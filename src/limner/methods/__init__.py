"""One file a method, read top to bottom like its paper."""
