"""Chats as clients send them: messages, the tools that they offer, and the calls in what is answered."""
