"""The page at `/` for browsers: a chat, made of HTML, CSS and modules of JavaScript that all lie here."""
