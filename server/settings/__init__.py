"""What a person may choose about the server, under one name everywhere."""
