"""Real launchers and real faults over two hosts. Long, and apart from the other tests."""
