"""The client side of HTTP: a running server's chat, completions and live picture. What comes from
a server is bounded, and checked before it is used."""
