"""What the fields of a request mean, under the names of every dialect."""
