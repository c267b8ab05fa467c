"""Real launchers and real faults over two hosts; long, and apart from `make test`: `make clusters`."""
