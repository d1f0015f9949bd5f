"""Chats beside the cache: runs of cached tokens in the host's memory and on disk, named by what is in them."""
