"""A family for tests: what is a keyword, a name, a number in the lines of Python's own library."""
