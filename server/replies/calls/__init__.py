"""How models write calls of functions: one family a file, each a reader and a grammar."""
