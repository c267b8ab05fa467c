"""Faults under load: a server's requests while its processes, sockets and files go wrong."""
